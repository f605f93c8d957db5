"""Pairs of original and perturbed texts, from a table or from AdvGLUE's `dev_ann.json`."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pabee_jax.data import glue
from pabee_jax.data.files import read_table
from pabee_jax.data.labels import class_id_of
from pabee_jax.data.tables import checked_path, read_text
from pabee_jax.data.task import Examples, Task
from pabee_jax.errors import InputError, is_unicode, shown
from pabee_jax.io import storage

# AdvGLUE's names of the parts of a task, where they are not the task's name.
_ADVGLUE_PARTS = {"mnli": ("mnli", "mnli-mm")}


@dataclasses.dataclass(frozen=True)
class PerturbedPairs:
    """Original and perturbed texts of the same rows, with the same labels and ids.

    Attributes:
        original: the texts before the attack.
        perturbed: the texts after the attack, which changes a text so that a model may predict
            another label but a human reader would not.
    """

    original: Examples
    perturbed: Examples


def read_pairs(name: str, task: Task) -> PerturbedPairs:
    """Return the pairs in AdvGLUE's `dev_ann.json` or in a table.

    A table (.tsv, .csv, .jsonl, .json, .parquet, as `open_table` reads it) has the columns
    `original`, `perturbed` and `label`, and for tasks of two texts `original_pair` and
    `perturbed_pair`. Its labels are the task's class names or the spellings of GLUE's TSV files.

    Raises:
        InputError: the task is a regression task, the file cannot be read, or a row lacks a text
            or a label, or has a label that the task does not have.
    """
    if task.is_regression:
        raise InputError(
            f"--perturbed needs a classification task; {task.name} is a regression task"
        )
    path = Path(checked_path(storage.local_path_of(name)))
    content = _read_advglue_json(path)
    if content is not None:
        return _advglue_pairs(path, content, task)
    firsts, seconds = ["original", "perturbed"], ["original_pair", "perturbed_pair"]
    optional = [] if len(glue.text_columns(task.name)) == 2 else seconds
    table = read_table(path, [*firsts, *seconds], "label", optional=optional)
    takes_pairs = any(column in table.cells for column in seconds)
    for column in seconds if takes_pairs else []:
        if column not in table.cells:
            raise InputError(f"{path} has no column {column!r}: pairs of texts need both columns")
    labels = table.labels("label")
    class_id = class_id_of(task.submission_labels)
    is_submission = all(class_id(label) is not None for label in set(labels))
    names = task.submission_labels if is_submission else task.label_names
    ids = [str(row) for row in range(len(table))]
    class_ids = table.class_ids("label", names)
    original, perturbed = (
        Examples(
            table.texts(kind), table.texts(f"{kind}_pair") if takes_pairs else None, class_ids, ids
        )
        for kind in ("original", "perturbed")
    )
    return PerturbedPairs(original, perturbed)


def _read_advglue_json(path: Path) -> Mapping[str, Sequence[Any]] | None:
    """Return the rows of AdvGLUE's file by task; None if the file must be read as a table.

    AdvGLUE's file is one JSON object that maps every task to a list of rows.
    """
    if path.suffix.lower() != ".json":
        return None
    try:
        content = json.loads(read_text(path))
    except InputError:
        raise
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or not content:
        return None
    return content if all(isinstance(rows, list) for rows in content.values()) else None


def _advglue_pairs(path: Path, content: Mapping[str, Sequence[Any]], task: Task) -> PerturbedPairs:
    parts = [part for part in _ADVGLUE_PARTS.get(task.name, (task.name,)) if content.get(part)]
    if not parts:
        available = ", ".join(part for part, records in content.items() if records)
        raise InputError(
            f"{path} has no rows of task {task.name}; it has rows of {available or 'no task'}"
        )
    columns = glue.text_columns(task.name)
    texts: dict[str, list[list[str]]] = {"original": [], "perturbed": []}
    labels, ids = [], []
    for part in parts:
        for index, record in enumerate(content[part]):
            place = f"{path}, {part}, row {index}"
            if not isinstance(record, dict):
                raise InputError(f"{place}: not a JSON object")
            perturbed_texts = _texts(record, columns, place)
            original_texts = [record.get(f"original_{column}") for column in columns]
            for text in original_texts:
                if not isinstance(text, str | None) or not is_unicode(text or ""):
                    raise InputError(f"{place}: the original text {shown(text)} is no valid text")
            if not any(text and text.strip() for text in original_texts):
                raise InputError(
                    f"{place}: there is no original text; AdvGLUE's dev_ann.json has the original "
                    "texts, its dev.json does not"
                )
            # If only one text of a pair was attacked, the file has no original of the other text,
            # which is the same before and after the attack.
            pairs = zip(original_texts, perturbed_texts, strict=True)
            texts["original"].append([before or after for before, after in pairs])
            texts["perturbed"].append(perturbed_texts)
            label = record.get("label")
            if isinstance(label, bool) or label not in range(task.num_labels):
                raise InputError(
                    f"{place}: label {shown(label)} is not from 0 to {task.num_labels - 1}"
                )
            labels.append(label)
            ids.append(f"{part} {record.get('idx', index)}")
    # AdvGLUE's class ids are in the task's own order.
    class_ids = np.asarray(task.own_order or range(task.num_labels), np.int32)[labels]
    original, perturbed = (_examples(texts[kind], class_ids, ids) for kind in texts)
    return PerturbedPairs(original, perturbed)


def _texts(record: Mapping[str, Any], columns: Sequence[str], place: str) -> list[str]:
    for column in columns:
        if not isinstance(record.get(column), str):
            raise InputError(f"{place}: there is no text {column!r}")
        if not is_unicode(record[column]):
            raise InputError(f"{place}: the text {column!r} holds an incomplete Unicode escape")
    return [record[column] for column in columns]


def _examples(texts: Sequence[Sequence[str]], class_ids: np.ndarray, ids: Sequence[str]):
    first, *second = zip(*texts, strict=True)
    pairs = list(second[0]) if second else None
    return Examples(list(first), pairs, class_ids, ids)
