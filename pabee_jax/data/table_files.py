"""Writes tables in parts, and joins the parts: CSV, TSV, JSON lines and Parquet."""

import csv
import io
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from pabee_jax.errors import InputError
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
        table = _arrow_table(columns, records)
        write_atomically(path, lambda temporary: _write_parquet(temporary, [table]))
        return
    text = _as_text(path.suffix.lower(), columns, records)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def join(path: epath.Path, columns: Sequence[str], parts: Sequence[epath.Path]) -> None:
    """Write the rows of all parts to `path`, atomically."""
    if path.suffix.lower() == ".parquet":
        write_atomically(path, lambda temporary: _write_parquet(temporary, _tables(parts)))
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
        lines = (json.dumps(dict(record), ensure_ascii=False, default=str) for record in records)
        return "".join(f"{line}\n" for line in lines)
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
    if isinstance(value, bool | dict | list):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def _arrow_table(columns: Sequence[str], records: Sequence[Record]):
    import pyarrow

    values = {name: [record[name] for record in records] for name in columns}
    try:
        return pyarrow.table(values)
    except pyarrow.ArrowException:  # A column with values of several types.
        return pyarrow.table(
            {name: list(map(_text, of_column)) for name, of_column in values.items()}
        )


def _tables(parts: Sequence[epath.Path]):
    """Yield the tables of all parts, with the schema that fits all of them."""
    import pyarrow
    from pyarrow import parquet

    def schema_of(part):
        with part.open("rb") as file:
            return parquet.read_schema(file)

    # A column may have no value in one part, or integers in one part and floats in another.
    schema = pyarrow.unify_schemas(map(schema_of, parts), promote_options="permissive")
    for part in parts:
        with part.open("rb") as file:
            yield parquet.read_table(file).cast(schema)


def _write_parquet(path: epath.Path, tables: Iterable[Any]) -> None:
    from pyarrow import parquet

    tables = iter(tables)
    first = next(tables)
    with path.open("wb") as file, parquet.ParquetWriter(file, first.schema) as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)
