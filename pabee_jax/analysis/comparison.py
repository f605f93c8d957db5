"""Comparison of runs: runs that differ in their seed are pooled, groups are compared by row."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from pabee_jax.analysis import metrics
from pabee_jax.criteria import ExitCriterion
from pabee_jax.data.labels import class_ids_of
from pabee_jax.drivers.replay import replay
from pabee_jax.errors import InputError
from pabee_jax.inference.predictions import predictions_of

RESAMPLES = 2000
# Prefixes of the configuration fields in which the runs of a group may differ.
_POOLED = ("seed", "mesh.")


@dataclasses.dataclass(frozen=True)
class Run:
    """The configuration and the recorded logits of an evaluated run directory.

    Attributes:
        path: the run directory as the user gave it.
        fields: the training configuration; nested fields have dotted names.
        about: the content of `results.json`: task, split, metrics.
        logits: (L, N, C) float32, the logits of every exit.
        labels: (N,) class ids, or scores for regression.
        ids: (N,) row ids.
    """

    path: str
    fields: dict[str, Any]
    about: dict[str, Any]
    logits: Float[np.ndarray, "exits rows classes"]
    labels: np.ndarray
    ids: np.ndarray

    @property
    def class_names(self) -> Sequence[str]:
        """The class names by class id; empty for regression, and in results of old versions."""
        return self.about.get("classes", ())

    @property
    def positive_class(self) -> int:
        """The class id to which the F1 of two classes refers."""
        return self.about.get("positive_class", 1)

    def with_classes_of(self, first: "Run") -> "Run":
        """Return the run with the class ids of another run of the same classes."""
        order = class_ids_of(self.class_names, first.class_names)
        if order is None or order == sorted(order):
            return self
        names_and_ids = {
            "classes": first.class_names,
            "positive_class": order[self.positive_class],
        }
        return dataclasses.replace(
            self,
            about=self.about | names_and_ids,
            logits=self.logits[:, :, np.argsort(order)],
            labels=np.asarray(order, self.labels.dtype)[self.labels],
        )


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs whose configurations differ in the seed or the mesh only.

    Attributes:
        name: the fields and values that distinguish this group, such as `learning_rate=2e-05`.
        runs: the runs of the group, at least one.
    """

    name: str
    runs: Sequence[Run]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of one setting in one group of runs.

    Attributes:
        scores: (runs,) the metric of each run, as fractions.
        mean_exit_layers: (runs,) the mean exit layer of each run, from 1 to L.
        difference: mean score of this group minus mean score of the first group; None for the
            first group.
        interval: 95% bootstrap interval of `difference`; None for the first group. Undefined
            correlations are NaN.
    """

    scores: Sequence[float]
    mean_exit_layers: Sequence[float]
    difference: float | None = None
    interval: tuple[float, float] | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.scores)

    @property
    def median_exit_layer(self) -> float:
        return statistics.median(self.mean_exit_layers)


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Group the runs whose configurations differ in the seed or the mesh only.

    The classes of all runs get the class ids of the first run.

    Returns:
        The groups in the order of their first runs.

    Raises:
        InputError: the runs have different tasks, splits or rows.
    """
    first = runs[0]
    runs = [run.with_classes_of(first) for run in runs]
    for run in runs[1:]:
        for name in ("task", "split"):
            if run.about.get(name) != first.about.get(name):
                raise InputError(
                    f"runs with different values of {name} cannot be compared: {first.path} has "
                    f"{first.about.get(name)}, {run.path} has {run.about.get(name)}; compare runs "
                    "of the same task and split"
                )
        same_rows = np.array_equal(run.ids, first.ids) and np.array_equal(run.labels, first.labels)
        if not same_rows:
            raise InputError(
                f"{first.path} and {run.path} were evaluated on different rows; evaluate both "
                "again on the same data"
            )
    runs_by_configuration: dict[tuple, list[Run]] = {}
    for run in runs:
        configuration = tuple(
            (name, value) for name, value in run.fields.items() if _separates_groups(name)
        )
        runs_by_configuration.setdefault(configuration, []).append(run)
    varying_fields = [
        name
        for name in first.fields
        if _separates_groups(name) and len({run.fields[name] for run in runs}) > 1
    ]
    return [
        Group(
            ", ".join(f"{name}={group_runs[0].fields[name]}" for name in varying_fields)
            or "all runs",
            group_runs,
        )
        for group_runs in runs_by_configuration.values()
    ]


def compared(
    groups: Sequence[Group], settings: Sequence[ExitCriterion], metric: str, seed: int = 0
) -> list[list[Outcome]]:
    """Return the outcome of each setting in each group, with differences from the first group.

    The bootstrap resamples rows. All runs share the resampled rows, so the differences are paired,
    and the metric is averaged over the runs of a group. The interval therefore covers the choice of
    rows, and does not cover the choice of seeds.

    Args:
        groups: the result of `grouped`.
        settings: the criteria to replay on each run.
        metric: a name in `metrics.METRICS`.
        seed: seeds the resampling.

    Returns:
        One list per group, with one outcome per setting.
    """
    labels, positive_class = groups[0].runs[0].labels, groups[0].runs[0].positive_class
    random = np.random.default_rng(seed)
    draws = random.integers(0, len(labels), (RESAMPLES, len(labels)))
    outcomes_by_group, baseline = [], []
    for group in groups:
        outcomes = []
        for index, setting in enumerate(settings):
            replays = [_replay(setting, run) for run in group.runs]
            exit_layers, exit_logits = zip(*replays, strict=True)
            resampled = resampled_metric(exit_logits, labels, metric, draws, positive_class)
            outcome = Outcome(
                [
                    metrics.compute([metric], logits, labels, positive_class)[metric]
                    for logits in exit_logits
                ],
                [float(layers.mean()) for layers in exit_layers],
            )
            if outcomes_by_group:
                base_outcome, base_resampled = baseline[index]
                difference = float(np.mean(outcome.scores) - np.mean(base_outcome.scores))
                interval = (math.nan, math.nan)
                if not math.isnan(difference):
                    differences = resampled - base_resampled
                    low, high = np.nanquantile(differences, (0.025, 0.975))
                    interval = (float(low), float(high))
                outcome = dataclasses.replace(outcome, difference=difference, interval=interval)
            else:
                baseline.append((outcome, resampled))
            outcomes.append(outcome)
        outcomes_by_group.append(outcomes)
    return outcomes_by_group


def resampled_metric(
    exit_logits: Sequence[np.ndarray],
    labels: np.ndarray,
    metric: str,
    draws: Int[np.ndarray, "b n"],
    positive_class: int = 1,
) -> Float[np.ndarray, " b"]:
    """Return the metric on each draw of rows, averaged over the runs."""
    if metric == "accuracy":  # A mean over rows needs no scikit-learn call for each resample.
        correct = np.mean([predictions_of(logits) == labels for logits in exit_logits], axis=0)
        return correct[draws].mean(axis=1)

    def mean_over_runs(rows):
        values = [
            metrics.compute([metric], logits[rows], labels[rows], positive_class)
            for logits in exit_logits
        ]
        return np.mean([value[metric] for value in values])

    return np.array([mean_over_runs(rows) for rows in draws])


def _replay(setting: ExitCriterion, run: Run) -> tuple[np.ndarray, np.ndarray]:
    exit_layers, exit_logits = replay(setting, run.logits)
    return np.asarray(exit_layers), np.asarray(exit_logits)


def _separates_groups(name: str) -> bool:
    return not name.startswith(_POOLED)
