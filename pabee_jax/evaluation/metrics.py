"""GLUE's metrics from scikit-learn and scipy, by the names that tasks use."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from scipy import stats
from sklearn import metrics as sk

from pabee_jax.predictions import predictions_of


def _correlation(measure) -> Callable:
    def score(labels, predictions):
        with warnings.catch_warnings():
            # Of constant predictions there is no correlation: that is NaN, not a warning.
            warnings.simplefilter("ignore", stats.ConstantInputWarning)
            return measure(labels, predictions).statistic if len(labels) > 1 else math.nan

    return score


METRICS: dict[str, Callable] = {
    "accuracy": sk.accuracy_score,
    "f1": lambda labels, predictions: sk.f1_score(labels, predictions, zero_division=0.0),
    "macro_f1": lambda labels, predictions: sk.f1_score(
        labels, predictions, average="macro", zero_division=0.0
    ),
    "matthews": sk.matthews_corrcoef,
    "pearson": _correlation(stats.pearsonr),
    "spearman": _correlation(stats.spearmanr),
}


def compute(
    names: Sequence[str],
    logits: Float[np.ndarray, "rows classes"],
    labels: Shaped[np.ndarray, " rows"],
) -> dict[str, float]:
    """The named metrics of (rows, classes) logits; one class means the logits are scores.

    Fractions, not percentages. A correlation of constant predictions is NaN.
    """
    predictions = predictions_of(logits)
    return {name: float(METRICS[name](labels, predictions)) for name in names}


def nan_to_null(values: Any) -> Any:
    """Nested dicts and lists for JSON, which has no NaN."""
    if isinstance(values, dict):
        return {name: nan_to_null(value) for name, value in values.items()}
    if isinstance(values, list):
        return [nan_to_null(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
