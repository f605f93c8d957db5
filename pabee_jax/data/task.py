"""The interface of a data source: texts, labels and the meaning of the labels."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pabee_jax.data.labels import class_ids_of


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
        own_order: the class ids in the task's own order, which does not depend on the order of the
            classes in a checkpoint; empty if the order is 0, 1, ...
    """

    name: str
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    read: Callable[[str], Mapping[str, Examples]]
    submission_labels: tuple[str, ...] = ()
    own_order: tuple[int, ...] = ()

    @property
    def is_regression(self) -> bool:
        return not self.label_names

    @property
    def num_labels(self) -> int:
        """Width of a classifier's output: the number of classes, or 1 for regression."""
        return len(self.label_names) or 1

    @property
    def positive_class(self) -> int:
        """The class to which the F1 of two classes refers: the second in the task's own order."""
        return self.own_order[1] if self.own_order else 1

    def counts(self, labels: np.ndarray) -> dict[str, int]:
        """Return the number of rows of each class, in the order of the class ids."""
        counts = np.bincount(labels, minlength=self.num_labels).tolist()
        return dict(zip(self.label_names, counts, strict=True))

    def with_classes(self, names: Sequence[str]) -> "Task | None":
        """Return the task with the class names and the class ids of a classifier.

        Args:
            names: the classes of the classifier in the order of its outputs.

        Returns:
            None if `names` are not the classes of the task, see `labels.class_id_of`.
        """
        order = class_ids_of(self.label_names, names) or class_ids_of(self.submission_labels, names)
        if order is None or len(names) != self.num_labels:
            return None
        class_ids = np.asarray(order, np.int32)

        def read(split: str) -> dict[str, Examples]:
            return {
                name: part
                if part.labels is None
                else dataclasses.replace(part, labels=class_ids[part.labels])
                for name, part in self.read(split).items()
            }

        spellings = self.submission_labels or self.label_names
        submission_labels = tuple(spellings[i] for i in np.argsort(order))
        return dataclasses.replace(
            self,
            label_names=tuple(names),
            read=read,
            submission_labels=submission_labels,
            own_order=tuple(order),
        )
