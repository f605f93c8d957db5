"""Metrics of GLUE and of text classification by name, from scikit-learn and SciPy."""

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from scipy import optimize, stats
from sklearn import metrics as sk

from pabee_jax.data.task import Task
from pabee_jax.errors import listed
from pabee_jax.inference.predictions import predictions_of

# The gain in accuracy from which on another order of a classifier's outputs is worth a warning.
_MUCH_BETTER = 0.1
# With more classes, the best order takes too long to find.
_MOST_CLASSES = 1000


def _correlation(measure) -> Callable:
    def score(labels, predictions):
        # In float32, SciPy loses digits for scores that are large compared with their spread.
        labels, predictions = np.asarray(labels, float), np.asarray(predictions, float)
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


def wrong_order(
    logits: Float[np.ndarray, "rows classes"],
    labels: Shaped[np.ndarray, " rows"],
    task: Task,
    *,
    is_numbered: bool,
) -> str:
    """Return a sentence if the outputs of a classifier seem to be other classes than assumed.

    Either a constant answer is better than the classifier, or the same outputs in another order are
    much better.

    Args:
        logits: the logits at full depth.
        labels: class ids.
        task: the task of the rows.
        is_numbered: the classifier does not name its classes, and nobody has stated their order.

    Returns:
        The sentence with the likely cause; empty for other classifiers, for regression, and for
        more than 1,000 classes.
    """
    if task.is_regression or task.num_labels > _MOST_CLASSES:
        return ""
    rows, num_labels, predictions = len(labels), task.num_labels, predictions_of(logits)
    counts = np.bincount(num_labels * predictions + labels, minlength=num_labels**2)
    confusion = counts.reshape(num_labels, num_labels)
    outputs, best_order = optimize.linear_sum_assignment(confusion, maximize=True)
    accuracy, best = np.trace(confusion) / rows, confusion[outputs, best_order].sum() / rows
    class_counts = confusion.sum(axis=0)
    share = class_counts.max() / rows
    has_better_order = best > max(share, accuracy + _MUCH_BETTER)
    if accuracy >= share and not has_better_order:
        return ""
    text = f"full depth predicts the class of {accuracy:.2%} of {rows} rows"
    if accuracy < share:
        largest = task.label_names[class_counts.argmax()]
        text += f", and the constant answer {largest!r} that of {share:.2%}"
    if has_better_order:
        order = listed([task.label_names[class_id] for class_id in best_order])
        text += f"; with the outputs in the order {order}, it would be {best:.2%}"
    if is_numbered:
        return (
            f"{text}: the outputs have no names, and are taken for {listed(task.label_names)} in "
            "this order; state another order with config.label_names"
        )
    return f"{text}: the model may be trained for other rows, or its id2label have a wrong order"
