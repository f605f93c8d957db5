"""Metrics of GLUE and of text classification by name, from scikit-learn and SciPy."""

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from scipy import stats
from sklearn import metrics as sk

from pabee_jax.data.task import Task
from pabee_jax.errors import listed
from pabee_jax.inference.predictions import predictions_of


def _correlation(measure) -> Callable:
    def score(labels, predictions):
        # The correlation of equal scores is undefined.
        if len(labels) < 2 or not np.ptp(labels) or not np.ptp(predictions):
            return math.nan
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.NearConstantInputWarning)
            return measure(labels, predictions).statistic

    return score


def _matthews(labels, predictions) -> float:
    with warnings.catch_warnings():
        # scikit-learn returns 0, and warns, if all labels and predictions are one class.
        warnings.filterwarnings("ignore", "A single label was found")
        return sk.matthews_corrcoef(labels, predictions)


def _f1(labels, predictions, **options) -> Any:
    # The type stubs of scikit-learn list only the strings that zero_division accepts.
    return sk.f1_score(labels, predictions, zero_division=0.0, **options)  # pyright: ignore[reportArgumentType]


METRICS: dict[str, Callable] = {
    "accuracy": sk.accuracy_score,
    "f1": _f1,
    "macro_f1": functools.partial(_f1, average="macro"),
    "matthews": _matthews,
    "pearson": _correlation(stats.pearsonr),
    "spearman": _correlation(stats.spearmanr),
}


def compute(
    names: Sequence[str],
    logits: Float[np.ndarray, "rows classes"],
    labels: Shaped[np.ndarray, " rows"],
    positive_class: int = 1,
) -> dict[str, float]:
    """Return the named metrics as fractions, not percentages.

    Args:
        names: names in `METRICS`.
        logits: the logits of one exit per row; one class means that the logits are scores.
        labels: class ids, or scores for regression.
        positive_class: the class id to which "f1" refers.

    Returns:
        The metric by name. A correlation is NaN if all labels or all predictions are equal, and if
        there are fewer than two rows.
    """
    predictions = predictions_of(logits)
    options = {"f1": {"pos_label": positive_class}}
    return {
        name: float(METRICS[name](labels, predictions, **options.get(name, {}))) for name in names
    }


def undefined(
    values: Iterable[Mapping[str, float]], labels: Shaped[np.ndarray, " rows"] | None
) -> str:
    """Return a sentence on the metrics that are NaN, and why; empty if there are none.

    Args:
        values: the metrics of several settings or exits on the same rows.
        labels: the labels of the rows.
    """
    names = list(dict.fromkeys(n for v in values for n, value in v.items() if math.isnan(value)))
    if not names or labels is None:
        return ""
    if len(labels) < 2:
        reason = "and there is one row"
    elif np.ptp(labels) == 0:
        reason = f"and all {len(labels)} labels are {labels[0]:g}"
    else:
        reason = "and some exits or settings give all rows the same score"
    return (
        f"undefined: {' and '.join(names)}, because a correlation needs scores that differ, "
        f"{reason}"
    )


def below_constant_answer(
    logits: Float[np.ndarray, "rows classes"],
    labels: Shaped[np.ndarray, " rows"],
    task: Task,
    *,
    is_numbered: bool,
) -> str:
    """Return a sentence if a classifier is worse than the answer that is always the largest class.

    Args:
        logits: the logits at full depth.
        labels: class ids.
        task: the task of the rows.
        is_numbered: the classifier does not name its classes, and nobody has stated their order.

    Returns:
        The sentence with the likely cause; empty for a better classifier and for regression.
    """
    if task.is_regression:
        return ""
    counts = np.bincount(labels, minlength=task.num_labels)
    accuracy, share = np.mean(predictions_of(logits) == labels), counts.max() / len(labels)
    if accuracy >= share:
        return ""
    cause = (
        "its outputs have no names, and are taken for the classes "
        f"{listed(task.label_names)} in this order: state another order with config.label_names"
        if is_numbered
        else "it may be trained for other rows, or its class names be in the wrong order"
    )
    return (
        f"full depth is right for {accuracy:.2%} of {len(labels)} rows, but "
        f"{task.label_names[counts.argmax()]!r} is the class of {share:.2%}, so that the "
        f"classifier is worse than a constant answer: {cause}"
    )
