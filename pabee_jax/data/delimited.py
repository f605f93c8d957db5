"""The records of CSV and TSV files, with the records that cannot be read.

`pabee_jax.data.tables` reads tables of all formats.
"""

import codecs
import collections
import csv
import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from absl import logging

from pabee_jax.errors import InputError

# A longer record has an opening quotation mark without a closing one.
_LONGEST_RECORD = 1 << 24
# Fewer lines inside quotation marks may look like rows by chance.
_SWALLOWED_LINES = 5
_MALFORMED = "malformed CSV"


class Record(NamedTuple):
    """A record of a file.

    Attributes:
        first, last: its first and its last line, from 1.
        cells: the values of all columns.
        problem: why the record cannot be used; empty if it can.
        text: the lines of the record as they are in the file.
        bytes_read: how much of the file has been read.
    """

    first: int
    last: int
    cells: list[str]
    problem: str
    text: str
    bytes_read: int


class Dialect(NamedTuple):
    """How the cells of a record are written.

    Attributes:
        delimiter: the character between two cells.
        quotes: how a quotation mark in a quoted cell is written, "doubled" (RFC 4180) or "escaped"
            (by a backslash, as Spark writes it); "text" if no cell is quoted.
    """

    delimiter: str
    quotes: str

    def reader(self, lines: Iterable[str]) -> Iterator[list[str]]:
        """Yield the cells of every record of `lines`; raise csv.Error for a malformed record."""
        if self.quotes == "text":
            return (line.removesuffix("\n").removesuffix("\r").split("\t") for line in lines)
        csv.field_size_limit(2**31 - 1)  # A text may be longer than the default of 128 KiB.
        escape: dict[str, Any] = {}
        if self.quotes == "escaped":
            # The csv module would drop a backslash before any other character.
            lines = (re.sub(r'\\(["\\])|\\', lambda m: m[0] if m[1] else r"\\", s) for s in lines)
            escape = {"escapechar": "\\"}
        return csv.reader(lines, delimiter=self.delimiter, strict=True, **escape)

    def width(self, line: str) -> int:
        """Return the number of cells of a line that is a record by itself; else 0."""
        try:
            return len(next(self.reader([line]), []))
        except csv.Error:
            return 0


class _Lines:
    """The lines of a file; all lines of a record but its first can be given back.

    Attributes:
        width: the number of cells in the header; 0 before the header is read.
        taken: the lines of the current record.
    """

    def __init__(self, file: Iterator[str], dialect: Dialect):
        self._file, self._dialect = file, dialect
        self._again: collections.deque[str] = collections.deque()
        self.width = 0
        self.start_record()

    def start_record(self) -> None:
        self.taken: list[str] = []
        self._alike = self._characters = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._file)
        self._alike += bool(self.taken) and self._dialect.width(line) == self.width
        self._characters += len(line)
        self.taken.append(line)
        if self._characters > _LONGEST_RECORD and len(self.taken) > 1:
            raise csv.Error("a quotation mark is not closed")
        if len(self.taken) % 100 == 0 and (problem := self.swallowed()):
            raise csv.Error(problem)
        return line

    def swallowed(self) -> str:
        """Return why the lines of the record are not one record; empty if they are."""
        lines = len(self.taken) - 1
        # In a file of one column, every line without a delimiter looks like a row.
        if self.width < 2 or lines < _SWALLOWED_LINES or self._alike < 0.9 * lines:
            return ""
        return f"a quotation mark is not closed: the next {lines} lines look like rows"

    def give_back(self) -> None:
        self._again.extendleft(reversed(self.taken[1:]))
        del self.taken[1:]


def records(path: Any, dialect: Dialect) -> Iterator[Record]:
    """Yield the records of a file, the header first, without blank lines.

    A malformed record has one line: the next line is read as the start of another record.
    """
    with text_of(path, "\n" if dialect.quotes == "text" else "") as file:
        lines = _Lines(file, dialect)
        reader = dialect.reader(lines)
        last = 0
        while True:
            lines.start_record()
            cells: list[str] = []
            try:
                cells = next(reader)
                problem = lines.swallowed()
            except StopIteration:
                return
            except csv.Error as error:
                problem = str(error)
            if problem:
                lines.give_back()
                problem = f"{_MALFORMED}: {problem}"
            elif lines.width and len(cells) != lines.width:
                problem = f"{len(cells)} cells where the header has {lines.width}"
            first, last = last + 1, last + len(lines.taken)
            text = "".join(lines.taken)
            if text.strip(" \r\n"):
                lines.width = lines.width or len(cells)
                yield Record(first, last, cells, problem, text, position(file))


def dialect_of(path: Any, columns: Sequence[str]) -> Dialect:
    """Return the dialect of a .csv or .tsv file; log a dialect that the extension does not say.

    Args:
        path: the file.
        columns: names that the header must have; they tell commas from semicolons and tabs.
    """
    return _tsv_dialect(path) if path.suffix.lower() == ".tsv" else _csv_dialect(path, columns)


def _csv_dialect(path: Any, columns: Sequence[str]) -> Dialect:
    """Return RFC 4180's dialect, unless the header or fewer bad lines show another."""
    names = {",": "commas", ";": "semicolons", "\t": "tabs"}

    def fit(delimiter: str) -> tuple[bool, int]:
        header = next(records(path, Dialect(delimiter, "doubled")), None)
        cells = header.cells if header else []
        return set(columns) <= set(cells), max(1, len(cells))

    delimiter = max(names, key=fit)
    if delimiter != ",":
        logging.warning("%s: the cells are separated by %s, not by commas", path, names[delimiter])
    dialect = Dialect(delimiter, "doubled")
    with text_of(path, "\n") as file:
        has_escapes = any('\\"' in line for line in file)
    if has_escapes and (bad_lines := _bad_lines(records(path, dialect))):
        escaped = dialect._replace(quotes="escaped")
        if _bad_lines(records(path, escaped)) < bad_lines:
            logging.warning('%s: quotation marks in cells are read as escaped by "\\"', path)
            return escaped
    return dialect


def _tsv_dialect(path: Any) -> Dialect:
    """Return the dialect in which quotation marks are text, unless the file shows another.

    Cells are quoted if every quoted cell can be read and the header is quoted, a cell has doubled
    quotation marks, or fewer lines are bad.
    """
    text, quoted = Dialect("\t", "text"), Dialect("\t", "doubled")
    with text_of(path, "\n") as file:
        if not any(re.search(r'(^|\t)"', line) for line in file):
            return text
    bad_lines, is_quoted = 0, False
    for record in records(path, quoted):
        if record.problem.startswith(_MALFORMED):
            bad_lines = math.inf
            break
        bad_lines += _bad_lines([record])
        written = ['"' + cell.replace('"', '""') + '"' for cell in record.cells]
        pairs = zip(record.cells, written, strict=True)
        is_quoted |= any('"' in cell and in_quotes in record.text for cell, in_quotes in pairs)
        is_quoted |= record.first == 1 and record.text.rstrip("\r\n") == "\t".join(written)
    bad_lines_as_text = _bad_lines(records(path, text))
    if bad_lines < bad_lines_as_text or (is_quoted and bad_lines == bad_lines_as_text):
        logging.warning("%s: cells in quotation marks are read as in CSV", path)
        return quoted
    logging.warning("%s: quotation marks around cells are read as text", path)
    return text


def _bad_lines(rows: Iterable[Record]) -> int:
    return sum(row.last - row.first + 1 for row in rows if row.problem)


def refuse_utf16(path: Any) -> None:
    """Raise InputError for a file of UTF-16 text, as Excel and Windows write it."""
    with path.open("rb") as file:
        start = file.read(1024)
    is_marked = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if is_marked or b"\0" in start.partition(b"\n")[0]:
        raise InputError(f"{path}, line 1: not UTF-8 text but UTF-16; save the file as UTF-8")


def text_of(path: Any, newline: str) -> io.TextIOWrapper:
    """Open a UTF-8 file. Bytes that are not UTF-8 are a problem of their row, not of the file."""
    return io.TextIOWrapper(path.open("rb"), "utf-8-sig", errors="surrogateescape", newline=newline)


def position(file: io.TextIOWrapper) -> int:
    """Return how many bytes of the file have been read."""
    buffer: Any = file.buffer
    return buffer.tell()
