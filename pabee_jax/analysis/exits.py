"""What the exits know, from one pass: calibration, overthinking, agreement, hard and easy rows."""

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
    """Whether each exit is right about each row: its class, or its score up to `tolerance`."""
    answers = np.stack([predictions_of(each) for each in logits])
    return np.abs(answers - labels) <= tolerance if logits.shape[2] == 1 else answers == labels


def expected_calibration_error(
    logits: Float[np.ndarray, "rows classes"], labels: Int[np.ndarray, " rows"]
) -> float:
    """ECE: the mean distance of confidence and accuracy over ten bins of confidence.

    Confidence is the highest class probability; bins of equal width, weighted by their rows ("On
    Calibration of Modern Neural Networks", section 2).
    """
    probabilities = scipy.special.softmax(logits.astype(np.float64), axis=1)
    confidence = probabilities.max(axis=1)
    right = predictions_of(logits) == labels
    bins = np.clip(np.ceil(confidence * _BINS) - 1, 0, _BINS - 1).astype(int)
    gaps = np.bincount(bins, right - confidence, _BINS)
    return float(np.abs(gaps).sum() / len(labels))


@dataclasses.dataclass(frozen=True)
class Overthinking:
    """What happens between the first exit that is right and the last exit.

    Attributes:
        lost: (exits,) the share of all rows that this exit gets right and the last one wrong.
        won: (exits,) the share that this exit gets wrong and the last one right.
        ever_lost: the share of rows that some exit gets right and the last one wrong.
        layers_after: mean number of layers after the first right exit, of rows that have one.
    """

    lost: Float[np.ndarray, " exits"]
    won: Float[np.ndarray, " exits"]
    ever_lost: float
    layers_after: float


def overthinking(right: Bool[np.ndarray, "exits rows"]) -> Overthinking:
    """From `right_at`; the term is from Shallow-Deep Networks (arXiv 1810.07052)."""
    last, ever = right[-1], right.any(axis=0)
    after = len(right) - 1 - right.argmax(axis=0)[ever]
    return Overthinking(
        lost=(right & ~last).mean(axis=1),
        won=(~right & last).mean(axis=1),
        ever_lost=float((ever & ~last).mean()),
        layers_after=float(after.mean()) if len(after) else 0.0,
    )


def agreement_of_exits(
    logits: Float[np.ndarray, "exits rows classes"],
) -> Float[np.ndarray, "exits exits"]:
    """The share of rows on which two exits predict the same class; of scores their correlation.

    An exit whose scores are constant has no correlation: NaN.
    """
    answers = np.stack([predictions_of(each) for each in logits])
    if logits.shape[2] > 1:
        return (answers[:, None] == answers[None]).mean(axis=2)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.atleast_2d(np.corrcoef(answers))


def exit_shares(
    exit_layers: Sequence[Int[np.ndarray, " rows"]], num_layers: int
) -> Float[np.ndarray, "settings exits"]:
    """For each setting the share of rows that leave at layer 1, 2, ..., L."""
    return np.stack(
        [np.bincount(each, minlength=num_layers + 1)[1:] / len(each) for each in exit_layers]
    )


def by_difficulty(
    exit_layers: Sequence[Int[np.ndarray, " rows"]],
) -> tuple[Int[np.ndarray, " rows"], Float[np.ndarray, " rows"]]:
    """Row indices from the earliest to the latest mean exit layer over the settings, and that mean.

    Rows that leave together keep their order.
    """
    mean = np.mean(exit_layers, axis=0)
    return np.argsort(mean, kind="stable"), mean
