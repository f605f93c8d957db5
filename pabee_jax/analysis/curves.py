"""Every criterion over its whole range, from one pass: metric against mean exit layer."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from pabee_jax.criteria import CRITERIA, ExitCriterion, check_task, criterion_class
from pabee_jax.drivers.replay import replay_many

# Of a criterion with a threshold, so many thresholds from the data's own quantiles.
SETTINGS = 100
SAVINGS = (0.25, 0.5, 0.75)


@dataclasses.dataclass(frozen=True)
class Curve:
    """One criterion, from slow settings to fast ones.

    Attributes:
        name: the criterion, and what its settings have in common ("divergence, patience 2").
        settings: in the order of the other two.
        mean_exit_layers: (settings,) from 1 to L.
        scores: (settings,) the metric at each, a fraction; 0 for a correlation that is not defined.
        ends: the metric when every row leaves at layer 1, and at full depth.
        num_layers: L.
    """

    name: str
    settings: Sequence[ExitCriterion]
    mean_exit_layers: Float[np.ndarray, " settings"]
    scores: Float[np.ndarray, " settings"]
    ends: tuple[float, float]
    num_layers: int

    def at(self, layers_saved: float) -> float:
        """The metric when this share of the layers is saved.

        Between two settings the straight line: it is what one gets by choosing between them at
        random for each row. Beyond the slowest setting the line to full depth, beyond the fastest
        one the line to leaving at layer 1.
        """
        return float(np.interp((1 - layers_saved) * self.num_layers, *self.line))

    @property
    def area(self) -> float:
        """The mean of the metric over all mean exit layers from 1 to L."""
        places, scores = self.line
        width = places[-1] - places[0]
        return float(np.trapezoid(scores, places) / width) if width else float(scores[-1])

    @property
    def points(self) -> list[tuple[ExitCriterion, float, float]]:
        """Every setting with its mean exit layer and its metric."""
        layers, scores = self.mean_exit_layers.tolist(), self.scores.tolist()
        return list(zip(self.settings, layers, scores, strict=True))

    @property
    def line(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean exit layers, ascending from 1 to L, and the metric at each."""
        order = np.argsort(self.mean_exit_layers, kind="stable")
        places = np.concatenate([[1.0], self.mean_exit_layers[order], [self.num_layers]])
        scores = np.concatenate([self.ends[:1], self.scores[order], self.ends[1:]])
        return places, scores


def curves(
    logits: Float[np.ndarray, "exits rows classes"],
    score: Callable[[Float[np.ndarray, "rows classes"]], float],
    names: Sequence[str] = (),
    count: int = SETTINGS,
) -> list[Curve]:
    """A curve for every criterion that fits, or for those named.

    Args:
        score: the metric of (rows, classes) logits.
        names: criteria as in `config.json`; none: all.
        count: settings per threshold.

    Raises:
        InputError: a name that is unknown, or of a criterion of classes where there are scores.
    """
    is_regression = logits.shape[2] == 1
    fitting = [name for name, kind in CRITERIA.items() if kind.for_regression or not is_regression]
    ends = _score(score, logits[0]), _score(score, logits[-1])
    found = []
    for name in names or fitting:
        check_task(criterion_class(name), is_regression)
        for family, settings in criterion_class(name).families(logits, count).items():
            if settings:
                title = f"{name}, {family}" if family else name
                found.append(_curve(title, settings, logits, score, ends))
    return found


def _curve(name, settings, logits, score, ends) -> Curve:
    exit_layers, answers = replay_many(settings, logits)
    scores = np.array([_score(score, each) for each in answers])
    return Curve(name, settings, exit_layers.mean(axis=1), scores, ends, len(logits))


def _score(score, logits) -> float:
    value = score(logits)
    return 0.0 if math.isnan(value) else value
