"""Tables in CSV, TSV, JSON-lines and Parquet files, row by row, with the rows that have a problem.

Training, `predict` and `--perturbed` read their tables with `open_table`.
"""

import codecs
import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from pabee_jax.data import delimited
from pabee_jax.errors import InputError, first_line_of, is_unicode, listed, shown
from pabee_jax.io import storage

AnyPath = Path | epath.Path
_PARQUET_BATCH = 1024


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        path: the file.
        unit: the unit of `first` and `last`, "line" or "row".
        first, last: the first and the last line of the row in the file, from 1.
        cells: the values of the columns that were asked for; empty if the row cannot be read.
        problem: why the row cannot be used; empty if it can.
        bytes_read: how much of the file has been read.
    """

    path: AnyPath
    unit: str
    first: int
    last: int
    cells: dict[str, Any]
    problem: str
    bytes_read: int

    @property
    def place(self) -> str:
        """The place of the row for a message, such as "line 5" or "lines 5 to 66"."""
        if self.first == self.last:
            return f"{self.unit} {self.first}"
        return f"{self.unit}s {self.first} to {self.last}"


Rows = Callable[[], Iterator[Row]]


@dataclasses.dataclass(frozen=True)
class TableFile:
    """A file with rows.

    Attributes:
        path: the file, or a folder of Parquet files.
        size: the bytes of the file.
        columns: the names of all columns; of JSON, the names in the objects up to the one with
            which every column that was asked for has occurred.
        texts: the columns that must hold a text in every row.
        labels: the columns that must not be empty in any row.
        unchecked_rows: returns the rows, with the problems of reading them.
    """

    path: AnyPath
    size: int
    columns: Sequence[str]
    texts: Sequence[str]
    labels: Sequence[str]
    unchecked_rows: Rows

    def rows(self) -> Iterator[Row]:
        """Yield the rows; raise InputError if the file cannot be read further."""
        try:
            for row in self.unchecked_rows():
                problem = row.problem or self._problem(row.cells)
                yield row._replace(problem=problem) if problem else row
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {storage.reason_of(error)}") from None

    def _problem(self, cells: dict[str, Any]) -> str:
        """Return why the cells of a row cannot be used; empty if they can."""
        for name, value in cells.items():
            kind = "text" if name in self.texts else "label" if name in self.labels else "value"
            problem = _encoding_problem(value)
            if kind == "text":
                problem = problem or _text_problem(value)
            elif kind == "label" and _is_empty(value):
                problem = "is empty"
            if problem:
                return f"the {kind} in column {name!r} {problem}"
        return ""


def _encoding_problem(value: object) -> str:
    if isinstance(value, dict | list):
        value = json.dumps(value, ensure_ascii=False, default=str)
    if not isinstance(value, str) or is_unicode(value):
        return ""
    # `delimited.text_of` decodes bytes that are not UTF-8 to these characters.
    if any("\udc80" <= character <= "\udcff" for character in value):
        return "is not UTF-8 text; save the file as UTF-8"
    return "holds an incomplete Unicode escape"


def _text_problem(value: object) -> str:
    if value is None:
        return "is missing or null"
    if not isinstance(value, str):
        return f"is {shown(value)}; it must be a string"
    return "" if value.strip() else "is empty"


def _is_empty(value: object) -> bool:
    if isinstance(value, float):  # Some writers store integers as floats if a cell is null.
        return math.isnan(value)
    return value is None or (isinstance(value, str) and not value.strip())


def open_table(
    path: AnyPath,
    texts: Sequence[str] = (),
    labels: Sequence[str] = (),
    others: Sequence[str] = (),
    optional: Sequence[str] = (),
) -> TableFile:
    """Open a file whose extension says how it is read.

    Only the named columns are read. A column that the file lacks is null in all rows.

    Args:
        path: a local file or an object of a bucket; for Parquet, also a local folder of files.
        texts: columns that must hold a text in every row that can be used.
        labels: columns that must not be empty in a row that can be used.
        others: further columns.
        optional: the columns of `texts` and `labels` that the file may lack.

    Raises:
        InputError: there is no such file, it cannot be read, it is empty, or it lacks one of the
            columns or has the column twice.
    """
    reader = _READERS[checked_path(path).suffix.lower()]
    wanted = list(dict.fromkeys([*texts, *labels, *others]))
    required = [name for name in wanted if name not in optional]
    try:
        columns, rows = reader(path, wanted, required)
        size = _size(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {storage.reason_of(error)}") from None
    available = f"it has {listed(columns, repr)}"
    for name in wanted:
        if name in required and name not in columns:
            raise InputError(f"{path} has no column {name!r}: {available}")
        if columns.count(name) > 1:
            raise InputError(f"{path} has more than one column {name!r}: {available}")
    texts, labels = ([name for name in names if name in columns] for names in (texts, labels))
    return TableFile(path, size, columns, texts, labels, rows)


def checked_path(path: AnyPath) -> AnyPath:
    """Return the path if there is a file with a supported extension.

    Raises:
        InputError: the file does not exist or has another extension.
    """
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise InputError(f"{path} has none of the known extensions {', '.join(_READERS)}")
    try:
        exists = path.is_file() or _is_folder(path)
    except OSError:  # The name is too long, or a folder may not be searched.
        exists = False
    if not exists:
        absolute = "" if storage.is_remote(path) else f" (absolute path: {path.absolute()})"
        raise InputError(f"there is no file {path}{absolute}")
    return path


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file without its byte-order mark.

    Raises:
        InputError: the file cannot be read, is empty or is not UTF-8.
    """
    try:
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
        text = data.decode()
    except OSError as error:
        raise InputError(f"cannot read {path.absolute()}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from None
    if not text.strip():
        raise InputError(f"{path} is empty")
    return text


def _delimited(
    path: AnyPath, wanted: Sequence[str], required: Sequence[str]
) -> tuple[list[str], Rows]:
    delimited.refuse_utf16(path)
    dialect = delimited.dialect_of(path, required)
    header = next(delimited.records(path, dialect), None)
    if header is None:
        raise InputError(f"{path} is empty")
    if header.problem:
        raise InputError(f"{path}, line {header.first}: {header.problem}")
    indices = {name: header.cells.index(name) for name in wanted if name in header.cells}

    def rows() -> Iterator[Row]:
        records = delimited.records(path, dialect)
        next(records)
        for first, last, values, problem, _, bytes_read in records:
            cells = {} if problem else {name: values[index] for name, index in indices.items()}
            yield Row(path, "line", first, last, cells, problem, bytes_read)

    return header.cells, rows


def _json(path: AnyPath, wanted: Sequence[str], required: Sequence[str]) -> tuple[list[str], Rows]:
    """Open JSON lines, or one JSON array of objects, which is read into memory."""
    del required
    delimited.refuse_utf16(path)
    hook = functools.partial(_json_object, wanted)
    array = _json_array(path, hook)

    def rows() -> Iterator[Row]:
        if array is not None:
            for place, value in enumerate(array, start=1):
                yield Row(path, "row", place, place, *_checked_object(value), _size(path))
            return
        with delimited.text_of(path, "\n") as file:
            for line, text in enumerate(file, start=1):
                if text.strip():
                    parsed = _parsed(text, hook)
                    yield Row(path, "line", line, line, *parsed, delimited.position(file))

    columns: dict[str, None] = {}
    first_row = None
    for row in rows():
        columns |= dict.fromkeys(row.cells)
        first_row = first_row or row
        if columns.keys() >= set(wanted):
            break
    if first_row is None:
        raise InputError(f"{path} is empty")
    if not columns and first_row.problem:
        raise InputError(f"{path}, {first_row.place}: {first_row.problem}")

    def wanted_rows() -> Iterator[Row]:
        for row in rows():
            cells = {} if row.problem else {name: row.cells.get(name) for name in wanted}
            yield row._replace(cells=cells)

    return list(columns), wanted_rows


_Hook = Callable[[list[tuple[str, Any]]], Any]


def _json_array(path: AnyPath, hook: _Hook) -> list[Any] | None:
    """Return the elements of a file that is one JSON array; None for another file."""
    with delimited.text_of(path, "\n") as file:
        first_line = next((line for line in file if line.strip()), "")
        if not first_line.lstrip().startswith("["):
            return None
        try:
            return json.loads(first_line + file.read(), object_pairs_hook=hook)
        except (ValueError, RecursionError):
            return None


def _parsed(text: str, hook: _Hook) -> tuple[dict[str, Any], str]:
    """Return the object in a line, and why the line cannot be used ("" if it can)."""
    try:
        return _checked_object(json.loads(text, object_pairs_hook=hook))
    except (ValueError, RecursionError) as error:
        # `msg` omits the line number of the json module, which is always 1.
        return {}, f"malformed JSON: {getattr(error, 'msg', error)}"


def _checked_object(value: object) -> tuple[dict[str, Any], str]:
    if isinstance(value, ValueError):
        return {}, str(value)
    if not isinstance(value, dict):
        return {}, "not a JSON object; write one object per line"
    return value, ""


def _json_object(
    wanted: Sequence[str], pairs: list[tuple[str, Any]]
) -> dict[str, Any] | ValueError:
    """Return a JSON object, or an error if it has one of the wanted names twice.

    The json module would drop all but the last of equal names.
    """
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        for name in wanted:
            if names.count(name) > 1:
                return ValueError(f"the name {shown(name)} occurs twice in an object")
    return record


def _parquet(
    path: AnyPath, wanted: Sequence[str], required: Sequence[str]
) -> tuple[list[str], Rows]:
    """Open a Parquet file, or the files in a folder that Spark wrote."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"reading {path} needs pyarrow: pip install pyarrow") from None
    # Python refuses some values, such as a date after the year 9999.
    errors = (pyarrow.ArrowException, OSError, ValueError, OverflowError)
    columns: list[list[str]] = []
    num_rows = 0
    for part in _parts(path):
        try:
            with part.open("rb") as file:
                parquet_file = parquet.ParquetFile(file)
                columns.append(list(parquet_file.schema_arrow.names))
                num_rows += parquet_file.metadata.num_rows
        except errors as error:
            reason = first_line_of(error)
            raise InputError(f"{part} is not a readable Parquet file: {reason}") from None
        if lacking := [name for name in required if name not in columns[-1]]:
            available = f"it has {listed(columns[-1], repr)}"
            raise InputError(f"{part} has no column {lacking[0]!r}: {available}")
    if not columns:
        raise InputError(f"{path} is a folder without Parquet files")

    def rows() -> Iterator[Row]:
        place, size = 0, _size(path)
        for part, names in zip(_parts(path), columns, strict=True):
            present = [name for name in wanted if name in names]
            absent = dict.fromkeys(name for name in wanted if name not in names)
            try:
                with part.open("rb") as file:
                    batches = parquet.ParquetFile(file).iter_batches(
                        _PARQUET_BATCH, columns=present
                    )
                    for batch in batches:
                        by_name = zip(batch.schema.names, batch.columns, strict=True)
                        values = {name: _python_values(column) for name, column in by_name}
                        for index in range(batch.num_rows):
                            place += 1
                            cells = absent | {name: values[name][index] for name in present}
                            bytes_read = size * place // num_rows
                            yield Row(path, "row", place, place, cells, "", bytes_read)
            except errors as error:
                reason = first_line_of(error)
                raise InputError(f"{part} is not a readable Parquet file: {reason}") from None

    return columns[0], rows


def _python_values(column: Any) -> list[Any]:
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):  # Such as a date after the year 9999.
        return column.cast("string").to_pylist()


def _parts(path: AnyPath) -> list[AnyPath]:
    """Return the files of a table: the file, or the Parquet files in a local folder, in order."""
    if not _is_folder(path):
        return [path]
    folder = Path(path)
    # Spark's folders also hold "_SUCCESS", "_temporary/" and ".part-00000.parquet.crc".
    return sorted(
        part
        for part in folder.rglob("*.parquet")
        if part.is_file() and not re.search(r"(^|/)[._]", part.relative_to(folder).as_posix())
    )


def _is_folder(path: AnyPath) -> bool:
    return path.suffix.lower() == ".parquet" and not storage.is_remote(path) and path.is_dir()


def _size(path: AnyPath) -> int:
    return sum(epath.Path(part).stat().length for part in _parts(path))


_READERS = {
    ".csv": _delimited,
    ".tsv": _delimited,
    ".jsonl": _json,
    ".json": _json,
    ".parquet": _parquet,
}
