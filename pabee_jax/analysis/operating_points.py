"""Operating points: the metrics and exit layers of each setting on one dataset."""

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

# The change of a logit that counts as float32 rounding. Matrix products of different batch sizes
# differ by about 2e-6.
MARGIN = 1e-5


@dataclasses.dataclass(frozen=True)
class OperatingPoint:
    """The result of one setting on one dataset: a row of the table.

    Attributes:
        criterion: the setting.
        exit_layers: (N,) int, the exit layer of each row, from 1.
        logits: (N, C) float32, the logits of each row at its exit layer.
        metrics: metrics by name, as fractions; empty if the dataset has no labels.
        num_layers: L, the number of layers of the model.
        milliseconds: wall-clock time per example; None if the setting was not timed.
        wall_clock_speedup: wall-clock time at full depth divided by the wall-clock time of this
            setting; None if the setting was not timed.
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
        """1 - mean exit layer / L, which the original PABEE code prints as "Speed Up"."""
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
    """Replay every setting on the logits of one forward pass, and return the operating points."""
    points = []
    for setting in settings:
        exit_layers, exit_logits = map(np.asarray, replay(setting, logits))
        points.append(point_of(setting, exit_layers, exit_logits, len(logits), task, rows))
    return points


def agreement(
    found: Sequence[OperatingPoint], expected: Sequence[OperatingPoint], logits: np.ndarray
) -> str:
    """Describe how many exit layers differ between a driver and the replay of the full pass.

    Matrix products of different batch sizes round differently. An exit layer may therefore differ
    if the decision is within the rounding margin, and only then.

    Args:
        found: the operating points measured with the driver.
        expected: the operating points replayed on `logits`.
        logits: (exits, rows, classes) of the full pass.
    """
    total = differing = within_margin = 0
    for measured_point, replayed_point in zip(found, expected, strict=True):
        differs = measured_point.exit_layers != replayed_point.exit_layers
        close = within_rounding_margin(replayed_point.criterion, logits)
        total += len(differs)
        differing += int(differs.sum())
        within_margin += int((differs & close).sum())
    return (
        f"{differing} of {total} exit layers differ from the full pass ({within_margin} of them "
        f"may be float32 rounding: moving the logits by {MARGIN:g} changes the exit)"
    )


def within_rounding_margin(
    criterion: ExitCriterion, logits: Float[np.ndarray, "exits rows classes"]
) -> Bool[np.ndarray, " rows"]:
    """Return which rows change their exit layer or their class if the logits move by `MARGIN`.

    The function moves the logits of one class at a time: up at all exits, down at all exits, and
    alternately up and down from exit to exit. The alternating moves are needed because a criterion
    may depend on the logits of two neighboring exits.
    """
    exit_layers, exit_logits = map(np.asarray, replay(criterion, logits))
    alternating = np.where(np.arange(len(logits)) % 2, 1, -1)
    changed = np.zeros(logits.shape[1], bool)
    for signs, class_id in itertools.product(
        (1, -1, alternating, -alternating), range(logits.shape[2])
    ):
        moved = logits.copy()
        moved[:, :, class_id] += MARGIN * np.reshape(signs, (-1, 1))
        moved_exit_layers, moved_exit_logits = map(np.asarray, replay(criterion, moved))
        changed |= moved_exit_layers != exit_layers
        if logits.shape[2] > 1:
            changed |= predictions_of(moved_exit_logits) != predictions_of(exit_logits)
    return changed


def mean_exit_by_kind(point: OperatingPoint, kinds: Sequence[str]) -> dict[str, float]:
    """Return the mean exit layer of each kind of example, in order of first appearance."""
    row_kinds = np.asarray(kinds)
    return {
        kind: float(point.exit_layers[row_kinds == kind].mean()) for kind in dict.fromkeys(kinds)
    }


def point_of(setting, exit_layers, logits, num_layers, task: Task, rows: Rows) -> OperatingPoint:
    """Return the operating point of a setting, with the metrics of `logits`."""
    return OperatingPoint(setting, exit_layers, logits, metrics_of(logits, task, rows), num_layers)


def metrics_of(
    logits: Float[np.ndarray, "rows classes"], task: Task, rows: Rows
) -> dict[str, float]:
    """Return the metrics of the task, as fractions; an empty dict if the rows have no labels.

    If the split has several parts, a metric's name ends with the part, such as `accuracy_matched`.
    """
    labels = rows.dataset.labels
    if labels is None:
        return {}
    metrics_by_name = {}
    for part, where in rows.parts.items():
        suffix = f"_{part.partition('_')[2]}" if len(rows.parts) > 1 else ""
        values = metrics.compute(task.metrics, logits[where], labels[where], task.positive_class)
        metrics_by_name |= {f"{name}{suffix}": value for name, value in values.items()}
    return metrics_by_name
