"""A task from a user's own CSV, TSV, JSON-lines or Parquet files, and the tables behind it.

`pabee_jax.data.glue` and `pabee_jax.data.perturbed` read their files with the same tables.
"""

import codecs
import csv
import dataclasses
import functools
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import logging

from pabee_jax.data import labels
from pabee_jax.data.task import Examples, Task
from pabee_jax.errors import InputError, first_line_of, is_unicode, listed, shown
from pabee_jax.io import storage


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns of a file, with the position of every row in the file.

    The methods that return a column raise InputError at the first invalid cell.

    Attributes:
        path: the file.
        columns: all column names in the file, including columns that were not read.
        cells: the values of the columns that were read, by column name.
        places: the line or row number of every row in the file, from 1.
        unit: the unit of `places`, "line" or "row".
    """

    path: Path
    columns: Sequence[str]
    cells: Mapping[str, Sequence[object]]
    places: Sequence[int]
    unit: str = "line"

    def __len__(self) -> int:
        return len(self.places)

    def error(self, row: int, message: str) -> InputError:
        """Return an error about the row at index `row`, with its position in the file."""
        return InputError(f"{self.path}, {self.unit} {self.places[row]}: {message}")

    def texts(self, column: str) -> list[str]:
        """Return a column of strings; a string may be empty, but not null or of another type."""
        texts: list[str] = []
        for row, value in enumerate(self.cells[column]):
            if problem := text_problem(column, value):
                raise self.error(row, problem)
            texts.append(str(value))
        return texts

    def labels(self, column: str) -> list[str]:
        """Return a column of class labels as strings, see `labels.spelled`."""
        result: list[str] = []
        for row, value in enumerate(self.cells[column]):
            try:
                label = labels.spelled(value)
            except InputError as error:
                raise self.error(row, str(error)) from None
            if label is None:
                raise self.error(row, f"the label in column {column!r} is empty")
            if not is_unicode(label):
                message = f"the label in column {column!r} holds an incomplete Unicode escape"
                raise self.error(row, message)
            result.append(label)
        return result

    def class_ids(self, column: str, names: Sequence[str]) -> np.ndarray:
        """Return a column of labels as ids of the classes `names`, (N,) int32.

        See `labels.class_id_of` for the class that a label names.
        """
        class_id = functools.cache(labels.class_id_of(names))
        ids: list[int] = []
        for row, label in enumerate(self.labels(column)):
            row_id = class_id(label)
            if row_id is None:
                raise self.error(row, f"label {shown(label)} is not one of {listed(names)}")
            ids.append(row_id)
        return np.asarray(ids, np.int32)

    def scores(self, column: str, low: float = -math.inf, high: float = math.inf) -> np.ndarray:
        """Return a column of finite numbers from `low` to `high`, (N,) float32."""
        limit = float(np.finfo(np.float32).max)
        low, high = max(low, -limit), min(high, limit)
        valid = "a finite number" if high == limit else f"a number from {low:g} to {high:g}"
        scores: list[float] = []
        for row, value in enumerate(self.cells[column]):
            try:
                score = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
            except (TypeError, ValueError, OverflowError):
                score = math.nan
            if not low <= score <= high:
                message = f"score {shown(value)} in column {column!r} is not {valid}"
                raise self.error(row, message)
            scores.append(score)
        return np.asarray(scores, np.float32)


def text_problem(column: str, value: object) -> str:
    """Return why the value of a column is no text; empty if it is."""
    if value is None:
        return f"the text in column {column!r} is missing or null"
    if not isinstance(value, str):
        return f"the text in column {column!r} is {shown(value)}; it must be a string"
    if not is_unicode(value):
        return f"the text in column {column!r} holds an incomplete Unicode escape"
    return ""


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


def tsv_rows(path: Path) -> list[tuple[int, list[str]]]:
    """Return the line number and the cells of every line of a tab-separated file.

    Quotation marks are part of the text.
    """
    # `str.splitlines` would also split at \x85 and \u2028, which occur inside sentences.
    lines = read_text(path).removesuffix("\n").split("\n")
    rows = [(n, line.removesuffix("\r").split("\t")) for n, line in enumerate(lines, 1)]
    return _without_trailing_blanks(rows)


def _csv_rows(path: Path) -> list[tuple[int, list[str]]]:
    """Return the first line number and the cells of every RFC 4180 record."""
    csv.field_size_limit(2**31 - 1)  # A text may be longer than the default limit of 128 KiB.
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    rows: list[tuple[int, list[str]]] = []
    line = 1
    try:
        for cells in reader:
            rows.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}, line {line}: malformed CSV: {error}") from None
    return _without_trailing_blanks(rows)


def _without_trailing_blanks(rows: list[tuple[int, list[str]]]) -> list[tuple[int, list[str]]]:
    # Only if there are several columns: in a file of one column, a blank line is an empty text.
    while len(rows[0][1]) > 1 and rows[-1][1] in ([], [""]):
        rows.pop()
    return rows


def _read_delimited(path: Path, wanted: Sequence[str]) -> Table:
    (_, header), *rows = _csv_rows(path) if path.suffix.lower() == ".csv" else tsv_rows(path)
    for line, cells in rows:
        if len(cells) != len(header):
            raise InputError(
                f"{path}, line {line}: {len(cells)} cells where the header has {len(header)}"
            )
    present = [name for name in wanted if name in header]
    cells = {name: [row[header.index(name)] for _, row in rows] for name in present}
    return Table(path, header, cells, [line for line, _ in rows])


def _read_json_lines(path: Path, wanted: Sequence[str]) -> Table:
    records: list[dict[str, object]] = []
    for line, text in enumerate(read_text(path).rstrip().split("\n"), 1):
        try:
            record = json.loads(text, object_pairs_hook=json_object)
        except (ValueError, RecursionError) as error:
            # `msg` omits the line number of the json module, which is always 1.
            reason = getattr(error, "msg", error)
            raise InputError(f"{path}, line {line}: malformed JSON: {reason}") from None
        if not isinstance(record, dict):
            raise InputError(f"{path}, line {line}: not a JSON object; write one object per line")
        records.append(record)
    columns = list(dict.fromkeys(name for record in records for name in record))
    cells = {name: [record.get(name) for record in records] for name in wanted if name in columns}
    return Table(path, columns, cells, range(1, len(records) + 1))


def json_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return a JSON object; the json module would drop all but the last of equal names."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {shown(repeated)} occurs twice in an object")
    return record


def _read_parquet(path: Path, wanted: Sequence[str]) -> Table:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"reading {path} needs pyarrow: pip install pyarrow") from None
    try:
        with parquet.ParquetFile(path) as file:
            columns = list(file.schema_arrow.names)
            table = file.read(columns=[name for name in wanted if name in columns])
        # By position, because pyarrow cannot look up a column name that occurs twice.
        named_columns = zip(table.column_names, table.columns, strict=True)
        cells = {name: column.to_pylist() for name, column in named_columns}
    # Python refuses some values of a column, such as a date after the year 9999.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = first_line_of(error)
        raise InputError(f"{path} is not a readable Parquet file: {reason}") from None
    return Table(path, columns, cells, range(1, table.num_rows + 1), unit="row")


_READERS = {
    ".csv": _read_delimited,
    ".tsv": _read_delimited,
    ".jsonl": _read_json_lines,
    ".json": _read_json_lines,
    ".parquet": _read_parquet,
}


def checked_path(name: str) -> Path:
    """Return the path of an existing file with a supported extension.

    Raises:
        InputError: the file does not exist or has another extension.
    """
    path = storage.local_path_of(name)
    if path.suffix.lower() not in _READERS:
        raise InputError(f"{path} has none of the known extensions {', '.join(_READERS)}")
    try:
        exists = path.is_file()
    except OSError:  # The name is too long, or a folder may not be searched.
        exists = False
    if not exists:
        raise InputError(f"there is no file {path} (absolute path: {path.absolute()})")
    return path


def read_table(path: Path, wanted: Sequence[str], optional: Sequence[str] = ()) -> Table:
    """Return the columns `wanted`, and the columns of `optional` that the file has.

    Raises:
        InputError: the file cannot be read, has no rows, lacks a column of `wanted` or has two
            columns of the same name.
    """
    table = _READERS[path.suffix.lower()](path, [*wanted, *optional])
    available = f"it has {listed(table.columns, repr)}"
    for name in wanted:
        if name not in table.columns:
            raise InputError(f"{path} has no column {name!r}: {available}")
    for name in (*wanted, *optional):
        if table.columns.count(name) > 1:
            raise InputError(f"{path} has more than one column {name!r}: {available}")
    if not table:
        raise InputError(f"{path} has no rows")
    return table


def _class_names(path: Path, label: str) -> tuple[str, ...]:
    """Return the classes of the training file, see `labels.class_names`."""
    spelled = list(dict.fromkeys(read_table(path, [label]).labels(label)))
    names = labels.class_names(spelled)
    if len(names) < 2:
        raise InputError(f"{path} has only one label, {shown(spelled[0])}: two or more are needed")
    if len(names) < len(spelled):
        logging.warning(
            "%s: labels that are equal as numbers, such as 1 and 1.0, are one class: %s are the "
            "classes %s",
            path,
            listed(spelled),
            listed(names),
        )
    return names


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads the file of a split when it is called; the `read` of a task."""

    paths: Mapping[str, Path]
    text: str
    text_pair: str
    label: str
    label_names: tuple[str, ...]

    def __call__(self, split: str) -> dict[str, Examples]:
        if split not in self.paths:
            given = ", ".join(self.paths)
            raise InputError(f"no file was given for the {split!r} split (given: {given})")
        wanted = [name for name in (self.text, self.text_pair) if name]
        label = [self.label] if self.label else []
        if split == "test":
            table = read_table(self.paths[split], wanted, optional=label)
        else:
            table = read_table(self.paths[split], [*wanted, *label])
        examples = Examples(
            texts=table.texts(self.text),
            pairs=table.texts(self.text_pair) if self.text_pair else None,
            labels=self._labels(table) if self.label and self.label in table.columns else None,
            ids=[str(row) for row in range(len(table))],
        )
        return {split: examples}

    def _labels(self, table: Table) -> np.ndarray:
        if self.label_names:
            return table.class_ids(self.label, self.label_names)
        return table.scores(self.label)


def task(
    *,
    train: str = "",
    dev: str = "",
    test: str = "",
    text: str = "text",
    text_pair: str = "",
    label: str = "label",
    regression: bool = False,
    label_names: Sequence[str] = (),
    classifier: Sequence[str] = (),
) -> Task:
    """Return a task from a user's files; `Task.read` reads the file of a split.

    Args:
        train, dev, test: paths, empty for splits without a file. The extension determines the
            format: .csv, .tsv, .jsonl, .json (one object per line) or .parquet.
        text, text_pair, label: column names; `text_pair` is empty for single texts. Only the test
            file may lack the label column. `label` may be empty with `label_names` or
            `regression`: the rows then have no labels.
        regression: the labels are scores, not classes.
        label_names: class names by class id; if empty, the distinct labels of the training file.
        classifier: without `label_names`, the names of a classifier's outputs. If the labels of the
            training file name some of them, these are the class names.

    Raises:
        InputError: no file is given, `text` is empty, `label` is empty while the classes are
            unknown, a file does not exist or has another extension, the training file has no valid
            labels, or `label_names` are missing, repeated or given for regression.
    """
    given = {"train": train, "dev": dev, "test": test}
    paths = {split: checked_path(name) for split, name in given.items() if name}
    names = tuple(label_names)
    if not text:
        raise InputError("files.text is empty: it must name the column of the texts")
    if not label and not names and not regression and not classifier:
        raise InputError(
            "files.label is empty: it must name the column of the labels, unless a checkpoint has "
            "the class names"
        )
    if not paths:
        raise InputError("no data files: give a train, dev or test file")
    if regression and names:
        raise InputError("label_names are for classification: leave them out with regression")
    if classifier and not (regression or names or label):
        names = tuple(classifier)
    if not regression and not names:
        if "train" not in paths:
            raise InputError(
                "the class names are unknown: give the train file, or config.label_names"
            )
        names = labels.in_order_of(classifier, _class_names(paths["train"], label))
    if len(set(names)) < len(names) or len(names) == 1:
        raise InputError(f"label_names must be two or more different names, not {listed(names)}")
    if regression:
        metrics = ("pearson", "spearman")
    else:
        metrics = ("accuracy", "f1" if len(names) == 2 else "macro_f1")
    read = _Reader(paths, text, text_pair, label, names)
    # F1 is that of the same class, whatever the order of the classes in a checkpoint.
    own_order = tuple(map(names.index, labels.in_own_order(names)))
    return Task("files", names, metrics, read, submission_labels=names, own_order=own_order)
