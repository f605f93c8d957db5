"""What a data source hands to the rest of the program: texts, labels and their meaning."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Examples:
    """The rows of one split before tokenisation.

    Attributes:
        texts: the first (or only) text of each row.
        pairs: the second text of each row; None when the task has single texts.
        labels: (N,) int32 class ids, or float32 scores for regression; None when they are hidden.
        ids: each row's identifier in its source (GLUE's `index` column; else the row number).
        kinds: what sort of example each row is, for reports; None when the source does not say.
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
    """What is predicted, how it is judged, and where its rows come from.

    Attributes:
        name: short name, such as "mrpc".
        label_names: class names by class id; empty for regression.
        metrics: names from `pabee_jax.evaluation.metrics`; the first one picks the best checkpoint.
        read: maps "train", "dev" or "test" to that split's parts by name. All tasks but MNLI have
            one part, named like the split ("dev"); MNLI has "dev_matched" and "dev_mismatched".
        submission_labels: what a GLUE submission file calls each class; empty for scores.
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
