"""Patience: exit once the classifiers agree often enough in a row."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pabee_jax.criteria.base import SWEPT_PATIENCES, Criterion, predictions, quantiles
from pabee_jax.criteria.registry import registered
from pabee_jax.criteria.validation import set_count, set_number


class PatienceState(NamedTuple):
    """Attributes:
    counter: (rows,) int32, how many times in a row the exits have agreed.
    prediction: (rows,) the previous exit's class (int32) or score (float32).
    """

    counter: Array
    prediction: Array


@registered("patience")
@dataclasses.dataclass(frozen=True)
class Patience(Criterion):
    """Exit once the classifiers agreed `patience` times in a row (PABEE, section 3.2).

    The earliest exit is layer `patience + 1`. Two classes agree when they are equal (ties go to the
    lowest index), two scores when they differ by less than `regression_threshold` (strictly).

    Attributes:
        patience: agreements needed, at least 0; 0 means no early exit.
        regression_threshold: for regression only, in units of the score.

    Raises:
        InputError: a negative or fractional patience, or a threshold that is not a number.
    """

    for_regression: ClassVar[bool] = True

    patience: int
    regression_threshold: float = 0.0

    def __post_init__(self):
        set_count(self, "patience", least=0)
        set_number(self, "regression_threshold")

    def init(self, logits, row):
        del row
        return PatienceState(jnp.zeros_like(logits[:, 0], jnp.int32), predictions(logits))

    def update(self, state, logits, layer):
        prediction = predictions(logits)
        if logits.shape[1] == 1:
            agree = jnp.abs(prediction - state.prediction) < self.regression_threshold
        else:
            agree = prediction == state.prediction
        counter = jnp.where(agree & (layer > 1), state.counter + 1, 0)
        leaves = (self.patience > 0) & (counter == self.patience)
        return PatienceState(counter, prediction), leaves

    @classmethod
    def families(cls, logits, count):
        exits = len(logits)
        if logits.shape[2] > 1:
            return {"": [cls(patience) for patience in range(exits - 1, 0, -1)]}
        thresholds = quantiles(np.abs(np.diff(logits[..., 0], axis=0)), count)
        return {
            f"patience {patience}": [cls(patience, threshold) for threshold in thresholds]
            for patience in SWEPT_PATIENCES[: exits - 1]
        }

    def warnings(self, num_layers: int, is_regression: bool) -> list[str]:
        found = []
        if self.patience >= num_layers - 1:
            found.append(f"patience {self.patience} saves nothing on {num_layers} layers")
        if is_regression and self.patience > 0 and self.regression_threshold <= 0:
            found.append(
                f"with regression_threshold {self.regression_threshold:g} no row ever exits early"
            )
        return found
