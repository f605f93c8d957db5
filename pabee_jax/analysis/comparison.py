"""Runs beside each other: seeds pooled, everything else compared on the same rows."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from pabee_jax.analysis import metrics
from pabee_jax.criteria import ExitCriterion
from pabee_jax.drivers.replay import replay
from pabee_jax.errors import InputError
from pabee_jax.inference.predictions import predictions_of

RESAMPLES = 2000
# What runs of one group may differ in: their rows in the table are pooled.
_POOLED = ("seed", "mesh.")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory that evaluate.py has been through.

    Attributes:
        path: as it was given.
        fields: its configuration by dotted names.
        about: what was evaluated: task, split, metrics.
        logits: (L, N, C) of every exit.
        labels: (N,).
        ids: (N,) of the rows.
    """

    path: str
    fields: dict[str, Any]
    about: dict[str, Any]
    logits: Float[np.ndarray, "exits rows classes"]
    labels: np.ndarray
    ids: np.ndarray


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only.

    Attributes:
        name: what sets it apart from the other groups.
        runs: at least one.
    """

    name: str
    runs: Sequence[Run]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One setting in one group.

    Attributes:
        scores: (runs,) the metric, fractions.
        mean_exit_layers: (runs,)
        difference: from the first group, of the means over the runs; None for that group itself.
        interval: 95% bootstrap interval of the difference.
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
    """Runs that differ in nothing but their seed, together; in the order given.

    Raises:
        InputError: runs of several tasks, splits or rows.
    """
    first = runs[0]
    for run in runs[1:]:
        for name in ("task", "split"):
            if run.about.get(name) != first.about.get(name):
                raise InputError(
                    f"{first.path} and {run.path} cannot be compared: their {name} is "
                    f"{first.about.get(name)} and {run.about.get(name)}"
                )
        same = np.array_equal(run.ids, first.ids) and np.array_equal(run.labels, first.labels)
        if not same:
            raise InputError(
                f"{first.path} and {run.path} were not evaluated on the same rows: evaluate both "
                "again on the same data"
            )
    found: dict[tuple, list[Run]] = {}
    for run in runs:
        key = tuple((name, value) for name, value in run.fields.items() if _counts(name))
        found.setdefault(key, []).append(run)
    telling = [
        name
        for name in first.fields
        if _counts(name) and len({run.fields[name] for run in runs}) > 1
    ]
    return [
        Group(", ".join(f"{name}={here[0].fields[name]}" for name in telling) or "all runs", here)
        for here in found.values()
    ]


def compared(
    groups: Sequence[Group], settings: Sequence[ExitCriterion], metric: str, seed: int = 0
) -> list[list[Outcome]]:
    """For each group, the outcome of each setting; differences are from the first group.

    The bootstrap draws rows, the same ones for all runs (paired), and takes the mean over the runs
    of a group: it tells how much depends on these rows, not on these seeds.
    """
    labels = groups[0].runs[0].labels
    random = np.random.default_rng(seed)
    draws = random.integers(0, len(labels), (RESAMPLES, len(labels)))
    found, baseline = [], []
    for group in groups:
        outcomes = []
        for index, setting in enumerate(settings):
            exits, answers = zip(*(_answers(setting, run) for run in group.runs), strict=True)
            resampled = _resampled(answers, labels, metric, draws)
            outcome = Outcome(
                [metrics.compute([metric], each, labels)[metric] for each in answers],
                [float(each.mean()) for each in exits],
            )
            if found:
                base_outcome, base_resampled = baseline[index]
                low, high = np.nanquantile(resampled - base_resampled, (0.025, 0.975))
                difference = float(np.mean(outcome.scores) - np.mean(base_outcome.scores))
                outcome = dataclasses.replace(
                    outcome, difference=difference, interval=(float(low), float(high))
                )
            else:
                baseline.append((outcome, resampled))
            outcomes.append(outcome)
        found.append(outcomes)
    return found


def _resampled(
    answers: Sequence[np.ndarray], labels: np.ndarray, metric: str, draws: Int[np.ndarray, "b n"]
) -> Float[np.ndarray, " b"]:
    """The metric on each draw of rows, the mean over the runs."""
    if metric == "accuracy":  # A mean over rows: no need to ask the library thousands of times.
        right = np.mean([predictions_of(each) == labels for each in answers], axis=0)
        return right[draws].mean(axis=1)

    def mean(rows):
        found = (metrics.compute([metric], each[rows], labels[rows]) for each in answers)
        return np.mean([each[metric] for each in found])

    return np.array([mean(rows) for rows in draws])


def _answers(setting: ExitCriterion, run: Run) -> tuple[np.ndarray, np.ndarray]:
    exit_layers, logits = replay(setting, run.logits)
    return np.asarray(exit_layers), np.asarray(logits)


def _counts(name: str) -> bool:
    return not name.startswith(_POOLED)
