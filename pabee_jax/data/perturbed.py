"""Pairs of an original and a perturbed text: our own files, and AdvGLUE's as they are."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pabee_jax.data import glue
from pabee_jax.data.files import checked_path, read_table, read_text
from pabee_jax.data.task import Examples, Task
from pabee_jax.errors import InputError

# AdvGLUE's names of MNLI's two parts.
_ADVGLUE_PARTS = {"mnli": ("mnli", "mnli-mm")}


@dataclasses.dataclass(frozen=True)
class PerturbedPairs:
    """The same rows twice, with the same labels.

    Attributes:
        original: as people wrote them.
        perturbed: changed so that a model may be misled and a person is not.
    """

    original: Examples
    perturbed: Examples


def read_pairs(name: str, task: Task) -> PerturbedPairs:
    """Reads AdvGLUE's `dev_ann.json`, or a table with columns of our own.

    A table (.tsv, .csv, .jsonl, .json with one object per line, .parquet) has the columns
    `original`, `perturbed` and `label`, and for tasks of two texts `original_pair` and
    `perturbed_pair`. Its labels are the task's class names, or what GLUE's files call them.

    Raises:
        InputError: a task of scores; a file that cannot be read; a row without one of its texts, or
            with a label that is not the task's.
    """
    if task.is_regression:
        raise InputError(f"--perturbed is for classes; task {task.name} has scores")
    path = checked_path(name)
    content = _whole_json(path)
    if content is not None:
        return _advglue(path, content, task)
    firsts, seconds = ["original", "perturbed"], ["original_pair", "perturbed_pair"]
    if len(glue.text_columns(task.name)) == 2:
        table = read_table(path, [*firsts, *seconds, "label"])
    else:
        table = read_table(path, [*firsts, "label"], optional=seconds)
    takes_pairs = any(column in table.cells for column in seconds)
    for column in [*firsts, *(seconds if takes_pairs else [])]:
        if column not in table.cells:
            raise InputError(f"{path} has no column {column!r}: pairs of texts need both.")
        for row, text in enumerate(table.texts(column)):
            if not text.strip():
                raise table.error(row, f"column {column!r} is empty: a pair has two texts")
    labels = table.labels("label")
    names = task.label_names
    if set(labels) <= set(task.submission_labels):
        names = task.submission_labels
    ids = [str(row) for row in range(len(table))]
    class_ids = table.class_ids("label", names)
    original, perturbed = (
        Examples(
            table.texts(kind), table.texts(f"{kind}_pair") if takes_pairs else None, class_ids, ids
        )
        for kind in ("original", "perturbed")
    )
    return PerturbedPairs(original, perturbed)


def _whole_json(path: Path) -> Mapping[str, Sequence[Any]] | None:
    """AdvGLUE's file is one object of lists, by task; anything else is read as a table."""
    if path.suffix.lower() != ".json":
        return None
    try:
        content = json.loads(read_text(path))
    except ValueError:
        return None
    is_advglue = isinstance(content, dict) and all(isinstance(v, list) for v in content.values())
    return content if is_advglue and content else None


def _advglue(path: Path, content: Mapping[str, Sequence[Any]], task: Task) -> PerturbedPairs:
    parts = [part for part in _ADVGLUE_PARTS.get(task.name, (task.name,)) if content.get(part)]
    if not parts:
        others = ", ".join(part for part, records in content.items() if records) or "none"
        raise InputError(f"{path} has no rows of task {task.name}; it has {others}.")
    columns = glue.text_columns(task.name)
    texts: dict[str, list[list[str]]] = {"original": [], "perturbed": []}
    labels, ids = [], []
    for part in parts:
        for index, record in enumerate(content[part]):
            place = f"{path}, {part}, row {index}"
            if not isinstance(record, dict):
                raise InputError(f"{place}: not an object.")
            changed = _texts(record, columns, place)
            # Of two texts often only one was attacked; then the file has no original of the other.
            given = [record.get(f"original_{column}") for column in columns]
            if not any(isinstance(text, str) and text.strip() for text in given):
                raise InputError(
                    f"{place}: there is no original text; AdvGLUE has them in dev_ann.json, not in "
                    "dev.json."
                )
            pairs = zip(given, changed, strict=True)
            texts["original"].append([text or same for text, same in pairs])
            texts["perturbed"].append(changed)
            label = record.get("label")
            if isinstance(label, bool) or label not in range(task.num_labels):
                raise InputError(
                    f"{place}: label {label!r} is not from 0 to {task.num_labels - 1}."
                )
            labels.append(label)
            ids.append(f"{part} {record.get('idx', index)}")
    original, perturbed = (_examples(texts[kind], labels, ids) for kind in texts)
    return PerturbedPairs(original, perturbed)


def _texts(record: Mapping[str, Any], columns: Sequence[str], place: str) -> list[str]:
    for column in columns:
        if not isinstance(record.get(column), str):
            raise InputError(f"{place}: there is no text {column!r}.")
    return [record[column] for column in columns]


def _examples(texts: Sequence[Sequence[str]], labels: Sequence[int], ids: Sequence[str]):
    first, *second = zip(*texts, strict=True)
    pairs = list(second[0]) if second else None
    return Examples(list(first), pairs, np.asarray(labels, np.int32), ids)
