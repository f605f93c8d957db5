"""The patience criterion of PABEE: exit once consecutive classifiers agree often enough."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pabee_jax.criteria.base import SWEPT_PATIENCES, Criterion, predictions, quantiles
from pabee_jax.criteria.registry import registered
from pabee_jax.criteria.validation import set_count, set_number


class PatienceState(NamedTuple):
    """The state of `Patience`.

    Attributes:
        counter: (rows,) int32, the number of consecutive agreements up to the last exit.
        prediction: (rows,), the previous exit's class (int32) or score (float32).
    """

    counter: Array
    prediction: Array


@registered("patience")
@dataclasses.dataclass(frozen=True)
class Patience(Criterion):
    """Exit once `patience` consecutive classifiers agree with their predecessors.

    From PABEE, section 3.2. The earliest exit layer is `patience + 1`. Two classifiers agree if
    they predict the same class (the lowest of tied classes) or, for regression, if their scores
    differ by strictly less than `regression_threshold`.

    Attributes:
        patience: the number of consecutive agreements, at least 0; 0 means no early exit.
        regression_threshold: for regression only, in units of the score.

    Example:
        The exits of one row predict the classes 0, 1, 1 and 1:

        >>> logits = np.array([[[2.0, 0.0]], [[0.0, 1.0]], [[0.0, 2.0]], [[0.0, 3.0]]])
        >>> [int(replay(Patience(patience), logits)[0][0]) for patience in (0, 1, 2, 3)]
        [4, 3, 4, 4]

    Raises:
        InputError: `patience` is negative or not a whole number, or `regression_threshold` is not a
            number.
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
        exits = (self.patience > 0) & (counter == self.patience)
        return PatienceState(counter, prediction), exits

    @classmethod
    def families(cls, logits, count):
        num_exits = len(logits)
        if logits.shape[2] > 1:
            return {"": [cls(patience) for patience in range(num_exits - 1, 0, -1)]}
        thresholds = quantiles(np.abs(np.diff(logits[..., 0], axis=0)), count)
        return {
            f"patience {patience}": [cls(patience, threshold) for threshold in thresholds]
            for patience in SWEPT_PATIENCES[: num_exits - 1]
        }

    def uses_early_exits(self, num_layers: int, is_regression: bool) -> bool:
        may_agree = not is_regression or self.regression_threshold > 0
        return 0 < self.patience < num_layers - 1 and may_agree

    def warnings(self, num_layers: int, is_regression: bool) -> list[str]:
        messages = []
        if self.patience >= num_layers - 1:
            messages.append(f"patience {self.patience} on {num_layers} layers allows no early exit")
        if is_regression and self.patience > 0 and self.regression_threshold <= 0:
            messages.append(
                f"regression_threshold {self.regression_threshold:g} allows no early exit; it must "
                "be above 0"
            )
        return messages
