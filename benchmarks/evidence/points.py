"""The quality of a run at given speed-ups, with settings chosen on other rows than those shown."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from benchmarks.evidence.runs import Run
from pabee_jax import Consistency, FixedLayer, Patience, criteria, replay
from pabee_jax.analysis import metrics
from pabee_jax.analysis.comparison import resampled_metric
from pabee_jax.analysis.exits import right_at
from pabee_jax.analysis.selection import halves
from pabee_jax.criteria import ExitCriterion
from pabee_jax.data import glue
from pabee_jax.drivers.replay import replay_many

SPEEDUPS = (1.5, 2.0, 3.0)
# For every task, the metric of the table: the one that the literature on early exit reports.
METRICS = {"mrpc": "f1", "stsb": "pearson", "sst2": "accuracy", "cola": "matthews"}
# A setting must save this factor more than its speed-up asks for, because the pool needs more time
# than in proportion to the layers: for a measured 2x, this is enough on all tasks but CoLA.
_OVERHEAD = 1.08
_THRESHOLDS = 200
_RESAMPLES = 1000
# For scores, an exit is correct within this distance of the label.
_TOLERANCE = 0.5


@dataclasses.dataclass(frozen=True)
class Point:
    """The outcome on all dev rows; each half has the setting that was chosen on the other half.

    Attributes:
        settings: the setting of the first and of the second half.
        exit_layers: (N,) the exit layer of every row.
        answers: (N, C) the logits of every row at its exit.
    """

    settings: tuple[ExitCriterion, ExitCriterion]
    exit_layers: np.ndarray
    answers: np.ndarray


def scorer(task: str, labels: np.ndarray) -> Callable[[np.ndarray], float]:
    """Return a function from (N, C) logits to the metric of the table."""
    return lambda answers: metrics.compute([METRICS[task]], answers, labels)[METRICS[task]]


def point_at(speedup: float, logits: np.ndarray, labels: np.ndarray, metric: str) -> Point:
    """Return the outcome of the settings that are chosen for a speed-up of the layers."""
    first, second = halves(len(labels))
    exit_layers = np.empty(len(labels), int)
    answers = np.empty_like(logits[-1])
    settings = []
    for shown, chosen_on in ((first, second), (second, first)):
        setting = chosen(speedup * _OVERHEAD, logits[:, chosen_on], labels[chosen_on], metric)
        exit_layers[shown], answers[shown] = map(np.asarray, replay(setting, logits[:, shown]))
        settings.append(setting)
    return Point((settings[0], settings[1]), exit_layers, answers)


def chosen(speedup: float, logits: np.ndarray, labels: np.ndarray, metric: str) -> ExitCriterion:
    """Return the setting for a speed-up of the layers.

    It is the slowest threshold of `Consistency`, fitted to the same rows, that reaches the
    speed-up. For scores it is, of a fixed layer and the slowest settings of patience 1, 2 and 3,
    the one with the best metric.
    """
    kinds = [Patience, FixedLayer] if logits.shape[2] == 1 else [Consistency]
    families = [kind.families(logits, _THRESHOLDS).values() for kind in kinds]
    candidates = []
    for settings in itertools.chain(*families):
        exit_layers, answers = map(np.asarray, replay_many(settings, logits))
        fast_enough = len(logits) / exit_layers.mean(axis=1) >= speedup
        if fast_enough.any():
            index = np.flatnonzero(fast_enough)[exit_layers.mean(axis=1)[fast_enough].argmax()]
            score = metrics.compute([metric], answers[index], labels)[metric]
            candidates.append((score, settings[index]))
    return max(candidates, key=lambda candidate: candidate[0])[1]


def record_of(run: Run, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Return the metrics of every exit, at full depth and at the speed-ups, with 95% intervals."""
    metric, names = METRICS[run.task], glue.task(run.task).metrics
    exits = [metrics.compute(names, exit_logits, labels) for exit_logits in logits]
    correct = right_at(logits, labels, _TOLERANCE)
    first_correct = np.where(correct.any(axis=0), correct.argmax(axis=0), len(logits) - 1)
    oracle = logits[first_correct, np.arange(len(labels))]
    record = {
        **dataclasses.asdict(run),
        "rows": len(labels),
        "exits": exits,
        "oracle": {
            "mean exit layer": float(first_correct.mean()) + 1,
            **metrics.compute(names, oracle, labels),
        },
        "points": {},
    }
    random = np.random.default_rng(0)
    draws = random.integers(0, len(labels), (_RESAMPLES, len(labels)))
    full_depth = resampled_metric([logits[-1]], labels, metric, draws)
    for speedup in SPEEDUPS:
        point = point_at(speedup, logits, labels, metric)
        values = metrics.compute(names, point.answers, labels)
        differences = resampled_metric([point.answers], labels, metric, draws) - full_depth
        record["points"][f"{speedup:g}"] = {
            "settings": [criteria.to_config(setting) for setting in point.settings],
            "layer speed-up": len(logits) / float(point.exit_layers.mean()),
            "exit layers": np.bincount(point.exit_layers, minlength=len(logits) + 1)[1:].tolist(),
            **values,
            "difference": values[metric] - exits[-1][metric],
            "interval": np.nanquantile(differences, (0.025, 0.975)).tolist(),
        }
    return record


def records_of(recorded: Mapping[Run, Mapping[str, np.ndarray]]) -> Iterator[dict[str, Any]]:
    for run, arrays in recorded.items():
        yield record_of(run, arrays["logits"], arrays["labels"])
