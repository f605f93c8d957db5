"""The fastest setting of a criterion whose risk is bounded with a stated confidence.

"Learn then Test" (arXiv 2110.01052) with fixed-sequence testing, as in "Fast yet Safe:
Early-Exiting with Risk Control" (arXiv 2405.20915) and CALM (arXiv 2207.07061).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Shaped
from scipy import stats

from pabee_jax.criteria import ExitCriterion
from pabee_jax.drivers.replay import replay_many
from pabee_jax.errors import InputError
from pabee_jax.inference.predictions import predictions_of


@dataclasses.dataclass(frozen=True)
class Guarantee:
    """A setting that was chosen, and what holds for it.

    Attributes:
        setting: the criterion.
        max_drop: with probability `confidence` over the calibration rows, the risk of a new row is
            at most this.
        confidence: see there.
        rows: how many calibration rows there were.
        harmed: on how many of them the early exit did harm.
        mean_exit_layer: on the calibration rows.
    """

    setting: ExitCriterion
    max_drop: float
    confidence: float
    rows: int
    harmed: int
    mean_exit_layer: float


class NoSetting(InputError):
    """No setting qualifies; the message says how many rows would be needed."""


def harms(
    answers: Float[np.ndarray, "settings rows classes"],
    full_depth: Float[np.ndarray, "rows classes"],
    labels: Shaped[np.ndarray, " rows"] | None = None,
    tolerance: float | None = None,
) -> Bool[np.ndarray, "settings rows"]:
    """Whether leaving early did harm: full depth is right and the early exit wrong.

    Without labels: the two disagree. A score is right, or agrees, up to `tolerance`.

    Raises:
        InputError: scores without a tolerance.
    """
    full = predictions_of(full_depth)
    early = np.stack([predictions_of(each) for each in answers])
    if full_depth.shape[1] > 1:
        close = np.equal
    elif tolerance is None:
        raise InputError("scores need a tolerance: up to which error does a score count as right?")
    else:
        close = lambda ours, theirs: np.abs(ours - theirs) <= tolerance  # noqa: E731
    if labels is None:
        return ~close(early, full)
    return close(full, labels) & ~close(early, labels)


def p_values(harmed: np.ndarray, rows: int, max_drop: float) -> Float[np.ndarray, " settings"]:
    """Of "the risk is above `max_drop`", for so many harmed rows: exact, because harm is binary."""
    return stats.binom.cdf(harmed, rows, max_drop)


def fixed_sequence(values: Float[np.ndarray, " settings"], level: float) -> int:
    """How many hypotheses are rejected: all up to the first p-value above `level`.

    In an order that was fixed beforehand every rejection is safe at the same level: the chance of
    even one false rejection is at most `level`.
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
    """The fastest setting whose risk is at most `max_drop` with the given confidence.

    Args:
        families: settings from slow to fast, fixed before these rows were seen (their thresholds
            too: take them from other rows). Each family is tested at its share of the error
            (Bonferroni).
        logits: of the calibration rows, which nothing may be evaluated on afterwards.
        labels: theirs; None measures disagreement with full depth instead.
        tolerance: see `harms`.

    Raises:
        InputError: a `max_drop` or a `confidence` that is not between 0 and 1.
        NoSetting: no setting qualifies.
    """
    for name, value in (("max_drop", max_drop), ("confidence", confidence)):
        if not 0 < value < 1:
            raise InputError(f"{name} must be between 0 and 1, not {value}")
    rows, level = logits.shape[1], (1 - confidence) / len(families)
    needed = rows_needed(0.0, max_drop, level)
    if rows < needed:
        raise NoSetting(
            f"{rows} calibration rows are too few: to show a risk of at most {max_drop:g} with "
            f"confidence {confidence:g} for {_counted(families)} takes {needed} rows, even if "
            "early exit does no harm at all"
        )
    found, slowest = [], []
    for settings in families.values():
        exit_layers, answers = replay_many(settings, logits)
        harmed = harms(answers, logits[-1], labels, tolerance).sum(axis=1)
        slowest.append(harmed[0] / rows)
        accepted = fixed_sequence(p_values(harmed, rows, max_drop), level)
        if accepted:
            best = accepted - 1
            layers = float(exit_layers[best].mean())
            found.append(
                Guarantee(settings[best], max_drop, confidence, rows, int(harmed[best]), layers)
            )
    if not found:
        risk = min(slowest)
        more = rows_needed(risk, max_drop, level)
        told = (
            f"about {more} rows would show it"
            if more
            else "no number of rows can show it: allow a larger max_drop"
        )
        raise NoSetting(
            f"no setting qualifies: the slowest did harm to {100 * risk:.2f}% of {rows} rows, "
            f"which does not show a risk of at most {max_drop:g} with confidence {confidence:g}; "
            f"{told}"
        )
    return min(found, key=lambda guarantee: guarantee.mean_exit_layer)


def rows_needed(risk: float, max_drop: float, level: float) -> int | None:
    """The smallest number of rows that shows the bound when a share of `risk` is harmed.

    None if there is none (`risk` is not below `max_drop`), or it is above 10 million.
    """
    if risk >= max_drop:
        return None
    if risk == 0:
        return math.ceil(math.log(level) / math.log1p(-max_drop))
    low, high = 1, 10_000_000

    def shows(rows: int) -> bool:
        return bool(stats.binom.cdf(math.ceil(risk * rows), rows, max_drop) <= level)

    if not shows(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if shows(middle) else (middle + 1, high)
    return low


def _counted(families: Mapping) -> str:
    return "one criterion" if len(families) == 1 else f"{len(families)} criteria"
