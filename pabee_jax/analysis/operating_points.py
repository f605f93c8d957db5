"""What each setting of a criterion costs and gives, over one dataset."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from pabee_jax.analysis import metrics
from pabee_jax.analysis.rows import Rows
from pabee_jax.criteria import ExitCriterion
from pabee_jax.data.task import Task
from pabee_jax.drivers.replay import replay
from pabee_jax.inference.predictions import predictions_of

# What float32 allows: matrix products of different sizes differ by about 2e-6.
MARGIN = 1e-5


@dataclasses.dataclass(frozen=True)
class OperatingPoint:
    """One setting on one dataset: a row of the table.

    Attributes:
        criterion: the setting.
        exit_layers: (N,) int, from 1.
        logits: (N, C) of the exits that were taken.
        metrics: by name, fractions; empty without labels.
        num_layers: L.
        milliseconds: per example, if it was timed.
        wall_clock_speedup: measured time at full depth over measured time here, if timed.
    """

    criterion: ExitCriterion
    exit_layers: Int[np.ndarray, " rows"]
    logits: Float[np.ndarray, "rows classes"]
    metrics: Mapping[str, float]
    num_layers: int
    milliseconds: float | None = None
    wall_clock_speedup: float | None = None

    @property
    def mean_exit_layer(self) -> float:
        return float(self.exit_layers.mean())

    @property
    def layers_saved(self) -> float:
        """1 - mean exit layer / L: what the original's code prints as "Speed Up"."""
        return 1 - self.mean_exit_layer / self.num_layers

    @property
    def layer_speedup(self) -> float:
        """L / mean exit layer."""
        return self.num_layers / self.mean_exit_layer


def replayed(
    logits: Float[np.ndarray, "exits rows classes"],
    settings: Sequence[ExitCriterion],
    task: Task,
    rows: Rows,
) -> list[OperatingPoint]:
    """Return the point of every setting, from the logits of one pass over the data."""
    points = []
    for setting in settings:
        exit_layers, answers = map(np.asarray, replay(setting, logits))
        points.append(point_of(setting, exit_layers, answers, len(logits), task, rows))
    return points


def agreement(
    found: Sequence[OperatingPoint], expected: Sequence[OperatingPoint], logits: np.ndarray
) -> str:
    """How many exits differ from those that the full pass says, in a sentence.

    Products of different batch sizes round differently, so a row may leave elsewhere when it hangs
    on a close decision; no other row may.
    """
    exits = moved = close = 0
    for one, other in zip(found, expected, strict=True):
        elsewhere = one.exit_layers != other.exit_layers
        exits, moved = exits + len(elsewhere), moved + int(elsewhere.sum())
        close += int((elsewhere & hangs_on_rounding(other.criterion, logits)).sum())
    return (
        f"{moved} of {exits} exits are at another layer than in the full pass ({close} of them "
        f"hang on a decision closer than {MARGIN:g})"
    )


def hangs_on_rounding(
    criterion: ExitCriterion, logits: Float[np.ndarray, "exits rows classes"]
) -> Bool[np.ndarray, " rows"]:
    """Which rows leave elsewhere, or answer another class, when logits move by `MARGIN`.

    One class after the other is moved up and down, at all exits alike and at every second one the
    other way: a decision hangs on one exit's logits, or on those of two neighbours.
    """
    exit_layers, answers = map(np.asarray, replay(criterion, logits))
    alternating = np.where(np.arange(len(logits)) % 2, 1, -1)
    found = np.zeros(logits.shape[1], bool)
    for signs, one_class in itertools.product(
        (1, -1, alternating, -alternating), range(logits.shape[2])
    ):
        moved = logits.copy()
        moved[:, :, one_class] += MARGIN * np.reshape(signs, (-1, 1))
        moved_layers, moved_answers = map(np.asarray, replay(criterion, moved))
        found |= moved_layers != exit_layers
        if logits.shape[2] > 1:
            found |= predictions_of(moved_answers) != predictions_of(answers)
    return found


def mean_exit_by_kind(point: OperatingPoint, kinds: Sequence[str]) -> dict[str, float]:
    """The mean exit layer of each kind of example, in order of first appearance."""
    each = np.asarray(kinds)
    return {kind: float(point.exit_layers[each == kind].mean()) for kind in dict.fromkeys(kinds)}


def point_of(setting, exit_layers, logits, num_layers, task: Task, rows: Rows) -> OperatingPoint:
    return OperatingPoint(setting, exit_layers, logits, metrics_of(logits, task, rows), num_layers)


def metrics_of(
    logits: Float[np.ndarray, "rows classes"], task: Task, rows: Rows
) -> dict[str, float]:
    """The task's metrics; with several parts each name says its part (accuracy_matched)."""
    labels = rows.dataset.labels
    if labels is None:
        return {}
    result = {}
    for part, where in rows.parts.items():
        suffix = f"_{part.partition('_')[2]}" if len(rows.parts) > 1 else ""
        values = metrics.compute(task.metrics, logits[where], labels[where])
        result |= {f"{name}{suffix}": value for name, value in values.items()}
    return result
