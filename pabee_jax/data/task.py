"""The interface of a data source: texts, labels and the meaning of the labels."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Examples:
    """The rows of one split before tokenization.

    Attributes:
        texts: the first (or only) text of every row.
        pairs: the second text of every row; None if the task has single texts.
        labels: (N,) int32 class ids, or float32 scores for regression; None if they are hidden.
        ids: the identifier of every row in its source: GLUE's `index` column, the part and `idx` of
            an AdvGLUE row, else the row number from 0.
        kinds: the category of every row, for reports; None if the source has no categories.
    """

    texts: Sequence[str]
    pairs: Sequence[str] | None
    labels: np.ndarray | None
    ids: Sequence[str]
    kinds: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.texts)


@dataclasses.dataclass(frozen=True)
class Task:
    """A classification or regression task: its labels, its metrics and the source of its rows.

    Attributes:
        name: short name, such as "mrpc".
        label_names: class names by class id; empty for regression.
        metrics: names from `pabee_jax.analysis.metrics`; the first metric selects the best
            checkpoint.
        read: maps "train", "dev" or "test" to that split's parts by name. All tasks but MNLI have
            one part with the name of the split ("dev"); MNLI has "dev_matched" and
            "dev_mismatched".
        submission_labels: spelling of each class in a GLUE submission file; empty for regression.
    """

    name: str
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    read: Callable[[str], Mapping[str, Examples]]
    submission_labels: tuple[str, ...] = ()

    @property
    def is_regression(self) -> bool:
        return not self.label_names

    @property
    def num_labels(self) -> int:
        """Width of a classifier's output: the number of classes, or 1 for regression."""
        return len(self.label_names) or 1
