"""Metrics of GLUE and of text classification by name, from scikit-learn and SciPy."""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from scipy import stats
from sklearn import metrics as sk

from pabee_jax.inference.predictions import predictions_of


def _correlation(measure) -> Callable:
    def score(labels, predictions):
        # In float32, SciPy loses digits for scores that are large compared with their spread.
        labels, predictions = np.asarray(labels, float), np.asarray(predictions, float)
        with warnings.catch_warnings():
            # The correlation of constant predictions is undefined; SciPy returns NaN and warns.
            warnings.simplefilter("ignore", stats.ConstantInputWarning)
            return measure(labels, predictions).statistic if len(labels) > 1 else math.nan

    return score


def _f1(labels, predictions, **options) -> Any:
    # The type stubs of scikit-learn list only the strings that zero_division accepts.
    return sk.f1_score(labels, predictions, zero_division=0.0, **options)  # pyright: ignore[reportArgumentType]


METRICS: dict[str, Callable] = {
    "accuracy": sk.accuracy_score,
    "f1": _f1,
    "macro_f1": functools.partial(_f1, average="macro"),
    "matthews": sk.matthews_corrcoef,
    "pearson": _correlation(stats.pearsonr),
    "spearman": _correlation(stats.spearmanr),
}


def compute(
    names: Sequence[str],
    logits: Float[np.ndarray, "rows classes"],
    labels: Shaped[np.ndarray, " rows"],
) -> dict[str, float]:
    """Return the named metrics as fractions, not percentages.

    Args:
        names: names in `METRICS`.
        logits: the logits of one exit per row; one class means that the logits are scores.
        labels: class ids, or scores for regression.

    Returns:
        The metric by name. A correlation of constant predictions, or of fewer than two rows, is
        NaN.
    """
    predictions = predictions_of(logits)
    return {name: float(METRICS[name](labels, predictions)) for name in names}
