"""Rows of CSV, TSV, JSON-lines and Parquet files, one at a time, with the rows that have a problem.

`pabee_jax.data.files` reads whole files, and stops at the first problem.
"""

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from pabee_jax.data.files import json_object
from pabee_jax.errors import InputError, first_line_of, is_unicode
from pabee_jax.io import storage

_PARQUET_BATCH = 1024
# So many rows of JSON lines may be unreadable before one that shows the columns.
_ROWS_FOR_COLUMNS = 100


class Row(NamedTuple):
    """A row of a file.

    Attributes:
        path: the file.
        place: the line (Parquet: the row) of the file, from 1.
        cells: the values by column name; empty if the row cannot be read.
        problem: why the row cannot be used; empty if it can.
        bytes_read: how much of the file has been read.
    """

    path: epath.Path
    place: int
    cells: Mapping[str, Any]
    problem: str
    bytes_read: int


class RowFile(NamedTuple):
    """A file with rows.

    Attributes:
        path: the file.
        columns: the names of its columns; of JSON lines, those of the first object that
            can be read.
        size: the bytes of the file.
        rows: returns the rows.
    """

    path: epath.Path
    columns: Sequence[str]
    size: int
    rows: Callable[[], Iterator[Row]]


def open_file(name: str) -> RowFile:
    """Open a file, local or `gs://`, whose extension says how it is read.

    Raises:
        InputError: the file does not exist, has another extension, is empty, or its first line
            cannot be read. The iteration raises InputError if the file cannot be read further.
    """
    path = storage.path_of(name)
    openers = {".csv": _csv, ".tsv": _tsv, ".jsonl": _json_lines, ".json": _json_lines}
    openers[".parquet"] = _parquet
    opener = openers.get(path.suffix.lower())
    if opener is None:
        raise InputError(f"{path} has none of the known extensions {', '.join(openers)}")
    try:
        if not path.is_file():
            raise InputError(f"there is no file {path}")
        return opener(path, path.stat().length)
    except OSError as error:
        raise InputError(f"cannot read {path}: {storage.reason_of(error)}") from None


def _lines(path: epath.Path, newline: str) -> io.TextIOWrapper:
    # A line that is not UTF-8 is a problem of its row, not of the file.
    binary: Any = path.open("rb")
    return io.TextIOWrapper(binary, "utf-8-sig", errors="surrogateescape", newline=newline)


def _position(file: io.TextIOWrapper) -> int:
    buffer: Any = file.buffer
    return buffer.tell()


def _csv(path: epath.Path, size: int) -> RowFile:
    csv.field_size_limit(2**31 - 1)
    with _lines(path, "") as file:
        header = next(csv.reader(file, strict=True), None)
    columns = _header(path, header)

    def rows() -> Iterator[Row]:
        with _lines(path, "") as file:
            reader = csv.reader(file, strict=True)
            next(reader)
            while True:
                line = reader.line_num + 1
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield Row(path, line, {}, f"malformed CSV: {error}", _position(file))
                    continue
                if cells or len(columns) == 1:
                    yield _delimited_row(path, line, columns, cells or [""], _position(file))

    return RowFile(path, columns, size, rows)


def _tsv(path: epath.Path, size: int) -> RowFile:
    """Open a tab-separated file; quotation marks are part of the text."""
    with _lines(path, "\n") as file:
        columns = _header(path, _tsv_cells(next(file, "")))

    def rows() -> Iterator[Row]:
        with _lines(path, "\n") as file:
            next(file)
            for line, text in enumerate(file, start=2):
                if text.strip("\r\n") or len(columns) == 1:
                    yield _delimited_row(path, line, columns, _tsv_cells(text), _position(file))

    return RowFile(path, columns, size, rows)


def _tsv_cells(line: str) -> list[str]:
    return line.removesuffix("\n").removesuffix("\r").split("\t")


def _header(path: epath.Path, names: Sequence[str] | None) -> Sequence[str]:
    if not names or not any(names):
        raise InputError(f"{path} is empty")
    if not all(is_unicode(name) for name in names):
        raise InputError(f"{path}, line 1: not UTF-8 text; save the file as UTF-8")
    return _unique(path, names)


def _unique(path: epath.Path, names: Sequence[str]) -> Sequence[str]:
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise InputError(f"{path} has more than one column {repeated[0]!r}")
    return names


def _delimited_row(
    path: epath.Path, line: int, columns: Sequence[str], cells: Sequence[str], bytes_read: int
) -> Row:
    if len(cells) != len(columns):
        problem = f"{len(cells)} cells where the header has {len(columns)}"
        return Row(path, line, {}, problem, bytes_read)
    if not all(is_unicode(cell) for cell in cells):
        return Row(path, line, {}, "not UTF-8 text", bytes_read)
    return Row(path, line, dict(zip(columns, cells, strict=True)), "", bytes_read)


def _json_lines(path: epath.Path, size: int) -> RowFile:
    def rows() -> Iterator[Row]:
        with _lines(path, "\n") as file:
            for line, text in enumerate(file, start=1):
                if text.strip():
                    yield _json_row(path, line, text, _position(file))

    first_rows = list(itertools.islice(rows(), _ROWS_FOR_COLUMNS))
    if not first_rows:
        raise InputError(f"{path} is empty")
    columns = next((list(row.cells) for row in first_rows if row.cells), [])
    return RowFile(path, columns, size, rows)


def _json_row(path: epath.Path, line: int, text: str, bytes_read: int) -> Row:
    problem, record = "", None
    if not is_unicode(text):
        problem = "not UTF-8 text"
    else:
        try:
            record = json.loads(text, object_pairs_hook=json_object)
        except (ValueError, RecursionError) as error:
            problem = f"malformed JSON: {getattr(error, 'msg', error)}"
    if not problem and not isinstance(record, dict):
        problem = "not a JSON object"
    return Row(path, line, record if isinstance(record, dict) else {}, problem, bytes_read)


def _parquet(path: epath.Path, size: int) -> RowFile:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"reading {path} needs pyarrow: pip install pyarrow") from None

    def unreadable(error: Exception) -> InputError:
        return InputError(f"{path} is not a readable Parquet file: {first_line_of(error)}")

    errors = (pyarrow.ArrowException, OSError, ValueError, OverflowError)
    try:
        with path.open("rb") as file:
            parquet_file = parquet.ParquetFile(file)
            columns = list(parquet_file.schema_arrow.names)
            num_rows = parquet_file.metadata.num_rows
    except errors as error:
        raise unreadable(error) from None

    def rows() -> Iterator[Row]:
        place = 0
        try:
            with path.open("rb") as file:
                for batch in parquet.ParquetFile(file).iter_batches(_PARQUET_BATCH):
                    for cells in batch.to_pylist():
                        place += 1
                        yield Row(path, place, cells, "", size * place // num_rows)
        except errors as error:
            raise unreadable(error) from None

    return RowFile(path, _unique(path, columns), size, rows)
