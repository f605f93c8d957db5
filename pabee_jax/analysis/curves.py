"""Trade-off curves of every criterion, from one forward pass: metric against mean exit layer."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from pabee_jax.criteria import CRITERIA, ExitCriterion, Patience, check_task, criterion_class
from pabee_jax.drivers.replay import replay_many
from pabee_jax.errors import InputError

# The number of thresholds per criterion; the thresholds are quantiles of the data.
SETTINGS = 100
# The shares of layers saved at which the table and sweep.json report the metric.
SAVINGS = (0.25, 0.5, 0.75)
# The most logits that a replay returns at once: 512 MB.
_VALUES_AT_ONCE = 2**27


@dataclasses.dataclass(frozen=True)
class Curve:
    """The trade-off curve of one criterion, from slow settings to fast settings.

    Attributes:
        name: the criterion, and the fields that its settings share ("divergence, patience 2").
        settings: the criteria, in the order of `mean_exit_layers` and `scores`.
        mean_exit_layers: (settings,) the mean exit layer of each setting, from 1 to L.
        scores: (settings,) the metric of each setting, as a fraction; NaN for an
            undefined correlation.
        ends: the metric when every row exits at layer 1, and the metric at full depth.
        num_layers: L, the number of layers of the model.
    """

    name: str
    settings: Sequence[ExitCriterion]
    mean_exit_layers: Float[np.ndarray, " settings"]
    scores: Float[np.ndarray, " settings"]
    ends: tuple[float, float]
    num_layers: int

    def at(self, layers_saved: float) -> float:
        """Return the metric at a share of layers saved, from 0 to 1, by linear interpolation.

        A point between two settings is reached by choosing between the two settings at random for
        each row. The curve extends from the slowest setting to full depth, and from the fastest
        setting to exiting at layer 1.
        """
        return float(np.interp((1 - layers_saved) * self.num_layers, *self.line))

    @property
    def area(self) -> float:
        """The mean of the metric over all mean exit layers from 1 to L."""
        layers, scores = self.line
        width = layers[-1] - layers[0]
        return float(np.trapezoid(scores, layers) / width) if width else float(scores[-1])

    @property
    def points(self) -> list[tuple[ExitCriterion, float, float]]:
        """Every setting with its mean exit layer and its metric."""
        layers, scores = self.mean_exit_layers.tolist(), self.scores.tolist()
        return list(zip(self.settings, layers, scores, strict=True))

    def coincides_with(self, other: "Curve") -> bool:
        """Return whether both curves have the same points, within rounding."""
        points, other_points = (
            np.unique(np.round(np.stack(curve.line, axis=1), 6), axis=0) for curve in (self, other)
        )
        return points.shape == other_points.shape and np.allclose(
            points, other_points, atol=2e-6, equal_nan=True
        )

    @property
    def line(self) -> tuple[np.ndarray, np.ndarray]:
        """The mean exit layers, ascending from 1 to L, and the metric at these layers."""
        order = np.argsort(self.mean_exit_layers, kind="stable")
        layers = np.concatenate([[1.0], self.mean_exit_layers[order], [self.num_layers]])
        scores = np.concatenate([self.ends[:1], self.scores[order], self.ends[1:]])
        return layers, scores


def curves(
    logits: Float[np.ndarray, "exits rows classes"],
    score: Callable[[Float[np.ndarray, "rows classes"]], float],
    names: Sequence[str] = (),
    count: int = SETTINGS,
) -> list[Curve]:
    """Return the trade-off curves of the named criteria, or of every criterion that fits the task.

    Args:
        logits: the logits of every exit; one class means that the logits are regression scores.
        score: computes the metric, as a fraction, of (rows, classes) logits.
        names: criteria as in `config.json`; empty for every criterion that fits the task.
        count: the number of thresholds per criterion.

    Returns:
        The curves; a criterion has one curve per family of settings that share a field.

    Raises:
        InputError: a name is unknown, or names a classification criterion for a regression task,
            or no named criterion has a setting for so few exits.
    """
    is_regression = logits.shape[2] == 1
    fitting_names = [
        name
        for name, criterion in CRITERIA.items()
        if criterion.for_regression or not is_regression
    ]
    ends = score(logits[0]), score(logits[-1])
    all_curves = []
    for name in names or fitting_names:
        check_task(criterion_class(name), is_regression)
        for family, settings in criterion_class(name).families(logits, count).items():
            if settings:
                title = f"{name}, {family}" if family else name
                all_curves.append(_curve(title, settings, logits, score, ends))
    if not all_curves:
        raise InputError(
            f"{' and '.join(names)} cannot be swept on a model whose number of exits is "
            f"{len(logits)}; name another criterion, such as fixed_layer"
        )
    return all_curves


def grouped(all_curves: Sequence[Curve]) -> list[list[Curve]]:
    """Return the curves in groups whose curves coincide, with the curves of patience first."""
    groups: list[list[Curve]] = []
    for curve in sorted(all_curves, key=lambda curve: not is_patience(curve)):
        group = next((group for group in groups if group[0].coincides_with(curve)), None)
        if group is None:
            groups.append([curve])
        else:
            group.append(curve)
    return groups


def is_patience(curve: Curve) -> bool:
    """Return whether the curve is the curve of the patience criterion."""
    return isinstance(curve.settings[0], Patience)


def _curve(name, settings, logits, score, ends) -> Curve:
    settings_at_once = max(1, _VALUES_AT_ONCE // logits[0].size)
    mean_exit_layers, scores = [], []
    for start in range(0, len(settings), settings_at_once):
        exit_layers, exit_logits = replay_many(settings[start : start + settings_at_once], logits)
        mean_exit_layers += exit_layers.mean(axis=1).tolist()
        scores += [score(setting_logits) for setting_logits in exit_logits]
    return Curve(name, settings, np.array(mean_exit_layers), np.array(scores), ends, len(logits))
