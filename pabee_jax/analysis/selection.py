"""The fastest setting whose metric is within one standard error of the metric at full depth."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, Shaped

from pabee_jax.analysis import metrics
from pabee_jax.analysis.comparison import resampled_metric
from pabee_jax.criteria import ExitCriterion
from pabee_jax.drivers.replay import replay_many

_RESAMPLES = 200


@dataclasses.dataclass(frozen=True)
class Selection:
    """A selected setting, with the figures on which it was selected.

    Attributes:
        setting: the criterion.
        score: the metric of the setting, a fraction.
        full_depth: the metric at full depth, a fraction.
        standard_error: the standard error of their difference, a fraction.
        mean_exit_layer: the mean exit layer of the setting, from 1.
        num_layers: L, the number of layers of the model.
        rows: the number of rows.
    """

    setting: ExitCriterion
    score: float
    full_depth: float
    standard_error: float
    mean_exit_layer: float
    num_layers: int
    rows: int


def fastest_within_one_standard_error(
    settings: Sequence[ExitCriterion],
    logits: Float[np.ndarray, "exits rows classes"],
    labels: Shaped[np.ndarray, " rows"],
    metric: str,
    positive_class: int = 1,
) -> Selection | None:
    """Return the setting with the lowest mean exit layer that loses at most one standard error.

    The standard error is that of the difference from full depth over the choice of rows, by a
    paired bootstrap. ("One standard error rule": "Classification and Regression Trees", section
    3.4.3.)

    Args:
        settings: settings of one criterion.
        logits: the logits of every exit.
        labels: the labels of the rows.
        metric: a name in `metrics.METRICS`.
        positive_class: the class id to which "f1" refers.

    Returns:
        None if no setting that saves a layer qualifies, or if the metric at full depth is NaN.
    """
    num_layers, rows, _ = logits.shape
    draws = np.random.default_rng(0).integers(0, rows, (_RESAMPLES, rows))
    full_depth = metrics.compute([metric], logits[-1], labels, positive_class)[metric]
    if math.isnan(full_depth):
        return None
    resampled_full_depth = resampled_metric([logits[-1]], labels, metric, draws, positive_class)
    exit_layers, answers = replay_many(settings, logits)
    mean_exit_layers = exit_layers.mean(axis=1)
    for index in np.argsort(mean_exit_layers, kind="stable"):
        if mean_exit_layers[index] >= num_layers:
            return None
        score = metrics.compute([metric], answers[index], labels, positive_class)[metric]
        if math.isnan(score):
            continue
        resampled = resampled_metric([answers[index]], labels, metric, draws, positive_class)
        standard_error = float(np.nanstd(resampled_full_depth - resampled))
        if full_depth - score <= standard_error:
            return Selection(
                settings[index],
                score,
                full_depth,
                standard_error,
                float(mean_exit_layers[index]),
                num_layers,
                rows,
            )
    return None


def halves(rows: int) -> tuple[Int[np.ndarray, " half"], Int[np.ndarray, " rest"]]:
    """Return two halves of the rows; the same halves for the same number of rows.

    A setting is selected on the first half, and can be evaluated on the second half.
    """
    order = np.random.default_rng(0).permutation(rows)
    return np.sort(order[: (rows + 1) // 2]), np.sort(order[(rows + 1) // 2 :])
