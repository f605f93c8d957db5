"""What a run says about its rows before its first step, and records of them at its end."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from pabee_jax.analysis import metrics
from pabee_jax.data import labels, used_rows
from pabee_jax.data.dataset import Dataset
from pabee_jax.data.task import Examples, Task


@dataclasses.dataclass(frozen=True)
class RunRows:
    """The labeled rows of a run.

    Attributes:
        task: the task of the run.
        parts: the training rows and the dev rows by the name of their part.
        is_numbered: the classifier from which the run starts does not name its classes, and
            nobody has stated their order.
    """

    task: Task
    parts: Mapping[str, Examples]
    is_numbered: bool

    @property
    def text(self) -> str:
        """One line for each part with labels; empty for regression."""
        if self.task.is_regression:
            return ""
        return "\n".join(
            f"{name}, {len(part)} rows: {labels.counts_text(self.task.counts(part.labels))}"
            for name, part in self.parts.items()
            if part.labels is not None
        )

    def warn(self) -> None:
        """Log likely mistakes in the labels."""
        scores = next(iter(self.dev.values())).labels
        if self.task.is_regression and scores is not None:
            undefined = {name: np.nan for name in self.task.metrics}
            if len(scores) < 2 or not np.ptp(scores):
                logging.warning("dev: %s", metrics.undefined([undefined], scores))
        train = self.parts["train"].labels
        if not self.task.is_regression and train is not None:
            for sentence in labels.warnings(self.task.counts(train)):
                logging.warning("train: %s", sentence)

    def warn_of_order(self, logits: np.ndarray, dataset: Dataset) -> None:
        """Log that the classifier of the start may have its classes in another order.

        Args:
            logits: (N, C) the logits at full depth on `dataset`.
            dataset: dev rows with labels.
        """
        assert dataset.labels is not None  # `examples_of` raised InputError otherwise.
        sentence = metrics.wrong_order(
            logits, dataset.labels, self.task, is_numbered=self.is_numbered
        )
        if sentence:
            logging.warning("dev, before step 1: %s", sentence)

    def with_used_rows(self, values: Mapping[str, Any], dev_uses: Sequence[str]) -> dict[str, Any]:
        """Return the values of `config.json` with the record of the rows that the run has used.

        Args:
            values: the values of `config.json`, with the record of earlier runs.
            dev_uses: the uses of the first part of dev.
        """
        records = values.get(used_rows.KEY)
        records = used_rows.with_uses(records, self.parts["train"], [used_rows.TRAINED])
        if dev_uses:
            records = used_rows.with_uses(records, next(iter(self.dev.values())), dev_uses)
        return {**values, used_rows.KEY: records}

    @property
    def dev(self) -> Mapping[str, Examples]:
        """The parts of dev."""
        return {name: part for name, part in self.parts.items() if name != "train"}
