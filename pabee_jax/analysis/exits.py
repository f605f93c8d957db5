"""Statistics of the exits from one forward pass: calibration error, overthinking and agreement."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.special
from jaxtyping import Bool, Float, Int, Shaped

from pabee_jax.inference.predictions import predictions_of

_BINS = 10


def right_at(
    logits: Float[np.ndarray, "exits rows classes"],
    labels: Shaped[np.ndarray, " rows"],
    tolerance: float,
) -> Bool[np.ndarray, "exits rows"]:
    """Return whether the prediction of each exit is correct for each row.

    A class is correct if it equals the label; a score is correct if it differs from the label by at
    most `tolerance`.
    """
    predictions = np.stack([predictions_of(exit_logits) for exit_logits in logits])
    if logits.shape[2] == 1:
        return np.abs(predictions - labels) <= tolerance
    return predictions == labels


def expected_calibration_error(
    logits: Float[np.ndarray, "rows classes"], labels: Int[np.ndarray, " rows"]
) -> float:
    """Return the expected calibration error (ECE) of one exit, from 0 to 1.

    The confidence of a row is its highest class probability. The rows are divided into ten
    confidence bins of equal width. ECE is the mean absolute difference between the accuracy and the
    mean confidence of a bin, weighted by the rows in the bin ("On Calibration of Modern Neural
    Networks", arXiv 1706.04599, section 2).
    """
    probabilities = scipy.special.softmax(logits.astype(np.float64), axis=1)
    confidence = probabilities.max(axis=1)
    correct = predictions_of(logits) == labels
    bins = np.clip(np.ceil(confidence * _BINS) - 1, 0, _BINS - 1).astype(int)
    gaps = np.bincount(bins, correct - confidence, _BINS)
    return float(np.abs(gaps).sum() / len(labels))


@dataclasses.dataclass(frozen=True)
class Overthinking:
    """Statistics of the layers between the first correct exit and the last exit.

    Attributes:
        lost: (exits,) the share of all rows for which this exit is correct and the last exit wrong.
        won: (exits,) the share of all rows for which this exit is wrong and the last exit correct.
        ever_lost: the share of all rows for which any exit is correct and the last exit wrong.
        layers_after: the mean number of layers after the first correct exit, over the rows for
            which any exit is correct; 0 if there is no such row.
    """

    lost: Float[np.ndarray, " exits"]
    won: Float[np.ndarray, " exits"]
    ever_lost: float
    layers_after: float


def overthinking(right: Bool[np.ndarray, "exits rows"]) -> Overthinking:
    """Return the overthinking statistics ("Shallow-Deep Networks", arXiv 1810.07052).

    Args:
        right: whether each exit is correct for each row; the result of `right_at`.
    """
    last_correct, any_correct = right[-1], right.any(axis=0)
    layers_after = len(right) - 1 - right.argmax(axis=0)[any_correct]
    return Overthinking(
        lost=(right & ~last_correct).mean(axis=1),
        won=(~right & last_correct).mean(axis=1),
        ever_lost=float((any_correct & ~last_correct).mean()),
        layers_after=float(layers_after.mean()) if len(layers_after) else 0.0,
    )


def agreement_of_exits(
    logits: Float[np.ndarray, "exits rows classes"],
) -> Float[np.ndarray, "exits exits"]:
    """Return the agreement between each pair of exits.

    For classification, agreement is the share of rows for which both exits predict the same class.
    For regression, agreement is the Pearson correlation of the scores, which is NaN if the scores
    of an exit are constant or if there is one row.
    """
    predictions = np.stack([predictions_of(exit_logits) for exit_logits in logits])
    if logits.shape[2] > 1:
        return (predictions[:, None] == predictions[None]).mean(axis=2)
    if predictions.shape[1] < 2:
        return np.full((len(logits), len(logits)), np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.atleast_2d(np.corrcoef(predictions))


def exit_shares(
    exit_layers: Sequence[Int[np.ndarray, " rows"]], num_layers: int
) -> Float[np.ndarray, "settings exits"]:
    """Return, for each setting, the share of rows that exit at layer 1, 2, ..., L."""
    return np.stack(
        [np.bincount(layers, minlength=num_layers + 1)[1:] / len(layers) for layers in exit_layers]
    )


def by_difficulty(
    exit_layers: Sequence[Int[np.ndarray, " rows"]],
) -> tuple[Int[np.ndarray, " rows"], Float[np.ndarray, " rows"]]:
    """Sort the rows by their mean exit layer over the settings.

    Returns:
        The row indices, from the lowest mean exit layer to the highest, and the mean exit layer of
        each row in the original order. The sort is stable.
    """
    mean_exit_layers = np.mean(exit_layers, axis=0)
    return np.argsort(mean_exit_layers, kind="stable"), mean_exit_layers
