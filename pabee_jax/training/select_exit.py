"""The end of a run: which patience should the finished checkpoint use?"""

from collections.abc import Callable, Sequence

import numpy as np
from absl import logging

from pabee_jax.analysis import metrics
from pabee_jax.analysis.operating_points import OperatingPoint
from pabee_jax.analysis.selection import fastest_within_one_standard_error, halves
from pabee_jax.criteria import ExitCriterion, Patience, describe
from pabee_jax.drivers.replay import replay
from pabee_jax.reports.tables import table

# With at least so many dev rows, half of them select the setting and the table shows the others.
_ENOUGH_FOR_HALVES = 400
# For regression, so many thresholds for each patience.
_THRESHOLDS = 20


def select_exit(
    logits: np.ndarray,
    labels: np.ndarray,
    metric_names: Sequence[str],
    say: Callable[[str], None],
    positive_class: int = 1,
) -> ExitCriterion | None:
    """Select the criterion of a finished checkpoint, and print its table on dev.

    The rule: the fastest patience whose primary metric is within one standard error of the metric
    at full depth.

    Args:
        logits: the logits (L, N, C) of every exit on dev.
        labels: the labels (N,) of dev.
        metric_names: the task's metrics; the first is the primary metric.
        say: prints a message.
        positive_class: the class id to which "f1" refers.

    Returns:
        None, with a warning, if no patience that saves a layer qualifies.
    """
    num_layers, num_rows, num_classes = logits.shape
    families = Patience.families(logits, _THRESHOLDS)
    settings = [setting for family in families.values() for setting in family]
    if not settings:
        return None
    rows = shown_rows = np.arange(num_rows)
    if num_rows >= _ENOUGH_FOR_HALVES:
        rows, shown_rows = halves(num_rows)
    selection = fastest_within_one_standard_error(
        settings, logits[:, rows], labels[rows], metric_names[0], positive_class
    )
    shown: list[ExitCriterion] = [Patience(0)]
    if num_classes > 1:
        shown += [Patience(patience) for patience in range(1, num_layers)]
    elif selection is not None:
        shown.append(selection.setting)
    points = [
        _point(setting, logits[:, shown_rows], labels[shown_rows], metric_names, positive_class)
        for setting in shown
    ]
    say(f"\ndev, {len(shown_rows)} rows:\n{table(points)}")
    if selection is None:
        reason = (
            f"no early exit keeps the dev {metric_names[0]} within one standard error of full depth"
        )
        if np.isnan(points[0].metrics[metric_names[0]]):
            reason = f"the dev {metric_names[0]} is undefined"
            if np.ptp(labels):  # That all labels are equal was said before the first step.
                reason += ", because all predictions are equal"
        logging.warning("%s: the checkpoint runs all layers", reason)
        return None
    say(
        f"selected: {describe(selection.setting)}, the fastest setting within one standard error "
        f"of full depth: {metric_names[0]} {100 * selection.score:.2f} and full depth "
        f"{100 * selection.full_depth:.2f} (standard error {100 * selection.standard_error:.2f}), "
        f"mean exit layer {selection.mean_exit_layer:.2f} of {num_layers}, on {selection.rows} "
        f"{'other ' if len(rows) < num_rows else ''}dev rows"
    )
    return selection.setting


def _point(
    setting: ExitCriterion,
    logits: np.ndarray,
    labels: np.ndarray,
    metric_names: Sequence[str],
    positive_class: int,
) -> OperatingPoint:
    exit_layers, answers = replay(setting, logits)
    values = metrics.compute(metric_names, answers, labels, positive_class)
    return OperatingPoint(setting, exit_layers, answers, values, len(logits))
