"""Writes tables in parts, and joins the parts: CSV, TSV, JSON lines and Parquet."""

import csv
import io
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath

from pabee_jax.errors import InputError
from pabee_jax.io import strict_json
from pabee_jax.io.atomic import write_atomically

EXTENSIONS = (".csv", ".tsv", ".jsonl", ".parquet")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
Record = Mapping[str, Any]


def check_extension(path: epath.Path) -> None:
    """Raise InputError for a file of another format, or without the library that writes it."""
    if path.suffix.lower() not in EXTENSIONS:
        raise InputError(f"{path} has none of the known extensions {', '.join(EXTENSIONS)}")
    if path.suffix.lower() == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise InputError(f"writing {path} needs pyarrow: pip install pyarrow") from None


def check_columns(path: epath.Path, columns: Sequence[str]) -> None:
    """Raise InputError if the format of `path` cannot hold the names of these columns."""
    for name in columns:
        if path.suffix.lower() == ".tsv" and any(character in name for character in "\t\r\n"):
            raise InputError(
                f"the name of column {name!r} holds a tab or a line break, which .tsv cannot; "
                "write .csv"
            )


def problem_of(record: Record, path: epath.Path) -> str:
    """Return why the format of `path` cannot hold the record; empty if it can."""
    if path.suffix.lower() != ".tsv":
        return ""
    for name, value in record.items():
        if any(character in _text(value) for character in "\t\r\n"):
            return f"column {name!r} holds a tab or a line break, which .tsv cannot: write .csv"
    return ""


def write_part(path: epath.Path, columns: Sequence[str], records: Sequence[Record]) -> None:
    """Write the records of a part, atomically."""
    if path.suffix.lower() == ".parquet":
        arrays = [_arrow_array([record[name] for record in records]) for name in columns]
        write_atomically(path, lambda temporary: _write_parquet(temporary, columns, [arrays]))
        return
    text = _as_text(path.suffix.lower(), columns, records)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def join(path: epath.Path, columns: Sequence[str], parts: Sequence[epath.Path]) -> None:
    """Write the rows of all parts to `path`, atomically.

    If no type of Parquet holds the values of a column in all parts, the column becomes text, and a
    warning is logged.
    """
    if path.suffix.lower() == ".parquet":
        types = _common_types(path, columns, parts)
        write_atomically(
            path, lambda temporary: _write_parquet(temporary, columns, _cast_parts(parts, types))
        )
        return
    header = _header(path.suffix.lower(), columns).encode()
    write_atomically(path, lambda temporary: concatenate(temporary, parts, header))


def concatenate(path: epath.Path, parts: Iterable[epath.Path], header: bytes = b"") -> None:
    """Write the header and the contents of all parts to `path`."""
    with path.open("wb") as target:
        target.write(header)
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, target, 1 << 20)


def _as_text(suffix: str, columns: Sequence[str], records: Sequence[Record]) -> str:
    if suffix == ".jsonl":
        return "".join(f"{_json(dict(record))}\n" for record in records)
    buffer = io.StringIO()
    writer = _csv_writer(buffer, suffix)
    writer.writerows([_text(record[name]) for name in columns] for record in records)
    return buffer.getvalue()


def _header(suffix: str, columns: Sequence[str]) -> str:
    if suffix == ".jsonl":
        return ""
    buffer = io.StringIO()
    _csv_writer(buffer, suffix).writerow(columns)
    return buffer.getvalue()


def _csv_writer(buffer: io.StringIO, suffix: str):
    if suffix == ".tsv":  # Quotation marks are part of the text, as in the files that are read.
        options: dict[str, Any] = {"quoting": csv.QUOTE_NONE, "quotechar": None}
        return csv.writer(buffer, delimiter="\t", lineterminator="\n", **options)
    return csv.writer(buffer, lineterminator="\n")


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return _json(value) if isinstance(value, bool | dict | list) else str(value)


def _json(value: Any) -> str:
    """Return the value as JSON, with null for NaN and text for what JSON does not have."""
    return strict_json.dumps(value, ensure_ascii=False, default=str)


def _arrow_array(values: Sequence[Any]):
    """Return an array that Parquet can hold: of text if the values have several types."""
    import pyarrow
    from pyarrow import parquet

    try:
        array = pyarrow.array(values)
        if pyarrow.types.is_nested(array.type):  # Parquet has no object without names.
            parquet.write_table(pyarrow.table({"": array}), pyarrow.BufferOutputStream())
        return array
    # Python's integers may be larger than those of Arrow.
    except (pyarrow.ArrowException, OverflowError, TypeError, ValueError):
        texts = [None if value is None else _text(value) for value in values]
        return pyarrow.array(texts, pyarrow.string())


def _cast(array: Any, kind: Any):
    import pyarrow

    if array.type == kind:
        return array
    if pyarrow.types.is_string(kind):
        return pyarrow.array(
            [None if value is None else _text(value) for value in array.to_pylist()], kind
        )
    return array.cast(kind)


def _arrays(part: epath.Path) -> list[Any]:
    from pyarrow import parquet

    with part.open("rb") as file:
        return parquet.read_table(file).columns


def _common_types(path: epath.Path, columns: Sequence[str], parts: Sequence[epath.Path]):
    """Return a type for every column in which the values of all parts can be written."""
    import pyarrow
    from pyarrow import parquet

    def schema_of(part: epath.Path):
        with part.open("rb") as file:
            return parquet.read_schema(file)

    schemas = [schema_of(part) for part in parts]
    types = []
    for index, name in enumerate(columns):
        fields = [pyarrow.schema([("", schema.types[index])]) for schema in schemas]
        try:
            kind = pyarrow.unify_schemas(fields, promote_options="permissive").types[0]
            if any(field.types[0] != kind for field in fields):
                for part in parts:  # An integer may have more digits than a float.
                    _cast(_arrays(part)[index], kind)
        except (pyarrow.ArrowException, ValueError, OverflowError):
            logging.warning("%s: column %r has values of several types; it is text", path, name)
            kind = pyarrow.string()
        types.append(kind)
    return types


def _cast_parts(parts: Sequence[epath.Path], types: Sequence[Any]) -> Iterator[list[Any]]:
    for part in parts:
        yield [_cast(array, kind) for array, kind in zip(_arrays(part), types, strict=True)]


def _write_parquet(
    path: epath.Path, columns: Sequence[str], tables: Iterable[Sequence[Any]]
) -> None:
    import pyarrow
    from pyarrow import parquet

    tables = iter(tables)
    first = pyarrow.table(list(next(tables)), names=list(columns))
    with path.open("wb") as file, parquet.ParquetWriter(file, first.schema) as writer:
        writer.write_table(first)
        for arrays in tables:
            writer.write_table(pyarrow.table(list(arrays), names=list(columns)))
