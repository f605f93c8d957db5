"""A task from a user's own CSV, TSV, JSON-lines or Parquet files."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import logging

from pabee_jax.data import labels, tables
from pabee_jax.data.task import Examples, Task
from pabee_jax.errors import InputError, is_unicode, listed, shown
from pabee_jax.io import storage


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns of the rows that are used, with the position of every row in the file.

    The methods that return a column raise InputError at the first invalid cell.

    Attributes:
        path: the file.
        columns: all column names in the file, including columns that were not read.
        cells: the values of the columns that were read, by column name.
        places: the (first) line or the row number of every row in the file, from 1.
        unit: the unit of `places`, "line" or "row".
        numbers: the index of every row among all rows of the file, from 0.
    """

    path: Path
    columns: Sequence[str]
    cells: Mapping[str, Sequence[object]]
    places: Sequence[int]
    unit: str = "line"
    numbers: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.places)

    def error(self, row: int, message: str) -> InputError:
        """Return an error about the row at index `row`, with its position in the file."""
        return InputError(f"{self.path}, {self.unit} {self.places[row]}: {message}")

    def texts(self, column: str) -> list[str]:
        """Return a column of strings."""
        return [str(value) for value in self.cells[column]]

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


def read_table(
    path: Path,
    texts: Sequence[str],
    label: str = "",
    *,
    optional: Sequence[str] = (),
    skip_bad_rows: bool = False,
    remedy: str = "correct the file",
) -> Table:
    """Return the columns of a file; every text and every label of the table has a value.

    Args:
        path: a file of `pabee_jax.data.tables`.
        texts: the columns of texts.
        label: the column of labels; empty for none.
        optional: the columns of these that the file may lack.
        skip_bad_rows: leave out the rows that cannot be used, with a warning, instead of raising
            an error.
        remedy: what a message about such rows recommends.

    Raises:
        InputError: the file cannot be read, lacks a column, has a row that cannot be used, or has
            no row that can be used.
    """
    labels = [label] if label else []
    file = tables.open_table(path, texts, labels, optional=optional)
    cells: dict[str, list[object]] = {name: [] for name in (*file.texts, *file.labels)}
    places, numbers, problems = [], [], []
    unit, total = "line", 0
    for number, row in enumerate(file.rows()):
        unit, total = row.unit, number + 1
        if row.problem:
            problems.append(f"{path}, {row.place}: {row.problem}")
            continue
        places.append(row.first)
        numbers.append(number)
        for name, column in cells.items():
            column.append(row.cells[name])
    if problems and not (skip_bad_rows and places):
        counts = f"{len(problems)} of {total} rows cannot be used"
        raise InputError(f"{problems[0]}; {counts}: {remedy}")
    if problems:
        counts = f"{len(problems)} of {total}"
        logging.warning("%s: skipped %s rows; the first, %s", path, counts, problems[0])
    if not places:
        raise InputError(f"{path} has no rows")
    return Table(path, file.columns, cells, places, unit, numbers)


def _class_names(table: Table, label: str) -> tuple[str, ...]:
    """Return the classes of the training file, see `labels.class_names`."""
    path, spelled = table.path, list(dict.fromkeys(table.labels(label)))
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


def _classifier_names(classifier: Sequence[str], table: Table, label: str) -> tuple[str, ...]:
    """Return the classes of a classifier, as the labels of a file without training file spell them.

    Raises:
        InputError: the labels are neither class ids nor names of the classifier's classes.
    """
    spelled = tuple(dict.fromkeys(table.labels(label))) if label in table.columns else ()
    names = labels.in_order_of(classifier, spelled)
    if (names != tuple(classifier) and not labels.are_numbered(names)) or not names:
        raise InputError("the class names are unknown: give the train file, or config.label_names")
    return names


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads the file of a split when it is called; the `read` of a task."""

    table: Callable[[str], Table]
    text: str
    text_pair: str
    label: str
    label_names: tuple[str, ...]

    def __call__(self, split: str) -> dict[str, Examples]:
        table = self.table(split)
        examples = Examples(
            texts=table.texts(self.text),
            pairs=table.texts(self.text_pair) if self.text_pair else None,
            labels=self._labels(table) if self.label in table.cells else None,
            ids=[str(number) for number in table.numbers],
        )
        return {split: examples}

    def _labels(self, table: Table) -> np.ndarray:
        if self.label_names:
            return table.class_ids(self.label, self.label_names)
        return table.scores(self.label)


def _split_table(
    paths: Mapping[str, Path], texts: Sequence[str], label: str, skip_bad_rows: bool, split: str
) -> Table:
    if split not in paths:
        given = ", ".join(paths)
        raise InputError(f"no file was given for the {split!r} split (given: {given})")
    return read_table(
        paths[split],
        texts,
        label,
        optional=[label] if split == "test" else [],
        skip_bad_rows=skip_bad_rows,
        remedy="correct the file, or set files.skip_bad_rows to leave such rows out",
    )


def task(
    *,
    train: str = "",
    dev: str = "",
    test: str = "",
    text: str = "text",
    text_pair: str = "",
    label: str = "label",
    regression: bool = False,
    skip_bad_rows: bool = False,
    label_names: Sequence[str] = (),
    classifier: Sequence[str] = (),
) -> Task:
    """Return a task from a user's files; `Task.read` reads the file of a split.

    Args:
        train, dev, test: paths, empty for splits without a file. The extension determines the
            format: .csv, .tsv, .jsonl, .json (one object per line, or one array) or .parquet (a
            file, or a folder of files).
        text, text_pair, label: column names; `text_pair` is empty for single texts. Only the test
            file may lack the label column. `label` may be empty with `label_names` or
            `regression`: the rows then have no labels.
        regression: the labels are scores, not classes.
        skip_bad_rows: leave out the rows that cannot be read or have an empty text or label, with a
            warning. Otherwise, such a row is an error.
        label_names: class names by class id; if empty, the distinct labels of the training file.
        classifier: without `label_names`, the names of a classifier's outputs. If the labels of the
            training file name some of them, these are the class names.

    Raises:
        InputError: no file is given, `text` is empty, `label` is empty while the classes are
            unknown, a file does not exist or has another extension, the training file has no valid
            labels, or `label_names` are missing, repeated or given for regression.
    """
    given = {"train": train, "dev": dev, "test": test}
    paths = {
        split: Path(tables.checked_path(storage.local_path_of(name)))
        for split, name in given.items()
        if name
    }
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
    texts = [text, text_pair] if text_pair else [text]
    table = functools.cache(functools.partial(_split_table, paths, texts, label, skip_bad_rows))
    if regression and names:
        raise InputError("label_names are for classification: leave them out with regression")
    if classifier and not (regression or names or label):
        names = tuple(classifier)
    if not regression and not names:
        if "train" in paths:
            names = labels.in_order_of(classifier, _class_names(table("train"), label))
        else:
            names = _classifier_names(classifier, table(next(iter(paths))), label)
    if len(set(names)) < len(names) or len(names) == 1:
        raise InputError(f"label_names must be two or more different names, not {listed(names)}")
    if regression:
        metrics = ("pearson", "spearman")
    else:
        metrics = ("accuracy", "f1" if len(names) == 2 else "macro_f1")
    read = _Reader(table, text, text_pair, label, names)
    # F1 is that of the same class, whatever the order of the classes in a checkpoint.
    own_order = tuple(map(names.index, labels.in_own_order(names)))
    return Task("files", names, metrics, read, submission_labels=names, own_order=own_order)
