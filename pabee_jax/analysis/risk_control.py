"""Risk control: the fastest setting whose risk is bounded at a given confidence.

The method is "Learn then Test" (arXiv 2110.01052) with fixed-sequence testing, as in "Fast yet
Safe: Early-Exiting with Risk Control" (arXiv 2405.20915) and CALM (arXiv 2207.07061).
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Shaped
from scipy import stats

from pabee_jax.criteria import ExitCriterion
from pabee_jax.drivers.replay import replay_many
from pabee_jax.errors import InputError
from pabee_jax.inference.predictions import predictions_of

_MOST_ROWS = 10_000_000


@dataclasses.dataclass(frozen=True)
class Guarantee:
    """A chosen setting with the bound on its risk.

    With probability `confidence` over the draw of the calibration rows, early exit harms a new row
    with a probability of at most `max_drop`. See `harms` for the definition of harm.

    Attributes:
        setting: the chosen criterion.
        max_drop: the upper bound on the risk, between 0 and 1.
        confidence: the probability that the bound holds, between 0 and 1.
        rows: the number of calibration rows.
        harmed: the number of calibration rows that early exit harms.
        mean_exit_layer: the mean exit layer of the calibration rows.
    """

    setting: ExitCriterion
    max_drop: float
    confidence: float
    rows: int
    harmed: int
    mean_exit_layer: float


class NoSetting(InputError):
    """The error for calibration rows on which no setting qualifies, with the rows needed.

    Attributes:
        is_tested: whether settings were tested on the calibration rows.
    """

    def __init__(self, message: str, is_tested: bool = False):
        super().__init__(message)
        self.is_tested = is_tested


def harms(
    answers: Float[np.ndarray, "settings rows classes"],
    full_depth: Float[np.ndarray, "rows classes"],
    labels: Shaped[np.ndarray, " rows"] | None = None,
    tolerance: float | None = None,
) -> Bool[np.ndarray, "settings rows"]:
    """Return whether early exit harms each row under each setting.

    With labels, early exit harms a row if the prediction at full depth is correct and the early
    prediction is wrong. Without labels, early exit harms a row if the two predictions differ. Two
    regression scores are equal if they differ by at most `tolerance`.

    Args:
        answers: the logits of each row at its exit layer, for each setting.
        full_depth: the logits of the last exit.
        labels: class ids, or scores for regression; None to compare with full depth.
        tolerance: the largest difference of two equal scores; not used for classification.

    Raises:
        InputError: the logits are regression scores and `tolerance` is None.
    """
    full_predictions = predictions_of(full_depth)
    early_predictions = np.stack([predictions_of(exit_logits) for exit_logits in answers])
    if full_depth.shape[1] > 1:
        equal = np.equal
    elif tolerance is None:
        raise InputError(
            "regression scores need a tolerance, which is missing: give the largest error of a "
            "score that counts as correct"
        )
    else:
        equal = lambda scores, targets: np.abs(scores - targets) <= tolerance  # noqa: E731
    if labels is None:
        return ~equal(early_predictions, full_predictions)
    return equal(full_predictions, labels) & ~equal(early_predictions, labels)


def p_values(harmed: np.ndarray, rows: int, max_drop: float) -> Float[np.ndarray, " settings"]:
    """Return the exact binomial p-value of the hypothesis "the risk is above `max_drop`".

    The p-value is exact because harm to a row is a binary variable.

    Args:
        harmed: (settings,) the number of harmed rows under each setting.
        rows: the number of calibration rows.
        max_drop: the bound on the risk, between 0 and 1.
    """
    return stats.binom.cdf(harmed, rows, max_drop)


def fixed_sequence(values: Float[np.ndarray, " settings"], level: float) -> int:
    """Return how many hypotheses fixed-sequence testing rejects.

    The test rejects every hypothesis before the first p-value above `level`. If the order of the
    hypotheses does not depend on the calibration rows, then the probability of any false rejection
    is at most `level` ("Learn then Test", arXiv 2110.01052).
    """
    failures = np.flatnonzero(values > level)
    return int(failures[0]) if len(failures) else len(values)


def fastest_safe_setting(
    families: Mapping[str, Sequence[ExitCriterion]],
    logits: Float[np.ndarray, "exits rows classes"],
    labels: Shaped[np.ndarray, " rows"] | None,
    *,
    max_drop: float,
    confidence: float,
    tolerance: float | None = None,
) -> Guarantee:
    """Return the fastest setting whose risk is at most `max_drop` at the given confidence.

    Args:
        families: lists of settings by name, each list from slow to fast. The settings, their
            thresholds included, must not depend on the calibration rows: take the thresholds from
            other rows. The families share the error probability equally (Bonferroni).
        logits: the logits of every exit on the calibration rows. Evaluate the chosen setting on
            other rows.
        labels: the labels of the calibration rows; None to bound the disagreement with full depth.
        max_drop: the bound on the risk, between 0 and 1.
        confidence: the probability that the bound holds, between 0 and 1.
        tolerance: the largest difference of two equal regression scores, see `harms`.

    Raises:
        InputError: `max_drop` or `confidence` is not between 0 and 1, or the logits are regression
            scores and `tolerance` is None.
        NoSetting: no setting qualifies, there are no settings, or there are too few calibration
            rows.
    """
    for name, value in (("max_drop", max_drop), ("confidence", confidence)):
        if not 0 < value < 1:
            raise InputError(f"{name} must be between 0 and 1, not {value}")
    if not families:
        raise NoSetting(f"the criteria have no settings for a model with {len(logits)} exits")
    rows, level = logits.shape[1], (1 - confidence) / len(families)
    needed = rows_needed(0.0, max_drop, level)
    if rows < needed:
        raise NoSetting(
            f"{rows} calibration rows are too few: a risk of at most {max_drop:g} at confidence "
            f"{confidence:g} for {_count_criteria(families)} needs at least {needed} rows, even if "
            "early exit harms no row"
        )
    guarantees, slowest_risks = [], []
    for settings in families.values():
        exit_layers, exit_logits = replay_many(settings, logits)
        harmed = harms(exit_logits, logits[-1], labels, tolerance).sum(axis=1)
        slowest_risks.append(harmed[0] / rows)
        accepted = fixed_sequence(p_values(harmed, rows, max_drop), level)
        if accepted:
            fastest = accepted - 1
            guarantees.append(
                Guarantee(
                    settings[fastest],
                    max_drop,
                    confidence,
                    rows,
                    int(harmed[fastest]),
                    float(exit_layers[fastest].mean()),
                )
            )
    if not guarantees:
        risk = min(slowest_risks)
        sufficient_rows = rows_needed(risk, max_drop, level)
        advice = (
            f"about {sufficient_rows} calibration rows would be enough"
            if sufficient_rows
            else "use a larger max_drop, because no number of calibration rows would be enough"
        )
        raise NoSetting(
            f"no setting qualifies: the slowest setting harms {100 * risk:.2f}% of {rows} "
            f"calibration rows, too many for a risk of at most {max_drop:g} at confidence "
            f"{confidence:g}; {advice}",
            is_tested=True,
        )
    return min(guarantees, key=lambda guarantee: guarantee.mean_exit_layer)


def rows_needed(risk: float, max_drop: float, level: float) -> int | None:
    """Return the smallest number of calibration rows that proves the bound at a given risk.

    Args:
        risk: the share of the calibration rows that early exit harms, from 0 to 1.
        max_drop: the bound on the risk, between 0 and 1.
        level: the error probability of the test, between 0 and 1.

    Returns:
        The number of rows; None if `risk` is not below `max_drop`, or if 10 million rows are too
        few.
    """

    def proves_bound(rows):
        return stats.binom.cdf(np.ceil(risk * rows), rows, max_drop) <= level

    if risk >= max_drop or not proves_bound(_MOST_ROWS):
        return None
    # The numbers of rows with the same number of harmed rows form a block, in which more rows are
    # stronger evidence. The evidence falls at the start of every block, so a binary search over all
    # numbers of rows would miss the smallest. The last row numbers of the blocks rise.
    first_harmed, chunk = 0, 4096
    while True:
        harmed = np.arange(first_harmed, first_harmed + chunk + 1)
        ends = _most_rows(harmed, risk)
        proven = np.flatnonzero(proves_bound(ends))
        if len(proven):
            break
        first_harmed += chunk
    block = int(proven[0])
    low, high = int(ends[block - 1]) + 1 if block else 1, int(ends[block])
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if proves_bound(middle) else (middle + 1, high)
    return low


def _most_rows(harmed: np.ndarray, risk: float) -> np.ndarray:
    """Return the largest numbers of rows of which a share of `risk` is at most `harmed` rows."""
    if risk == 0:
        return np.full_like(harmed, _MOST_ROWS)
    rows = np.minimum(harmed / risk, _MOST_ROWS).astype(np.int64)
    # The division may round.
    rows += np.ceil(risk * (rows + 1)) <= harmed
    return rows - (np.ceil(risk * rows) > harmed)


def _count_criteria(families: Mapping) -> str:
    return "one criterion" if len(families) == 1 else f"{len(families)} criteria"
