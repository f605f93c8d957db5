"""What criteria are compared with: a fixed layer for all, and the best exit for each."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pabee_jax.criteria.base import Criterion, predictions
from pabee_jax.criteria.registry import registered
from pabee_jax.criteria.validation import set_count, set_number


@registered("fixed_layer")
@dataclasses.dataclass(frozen=True)
class FixedLayer(Criterion):
    """Every row leaves at layer `layer` (from 1): the budgeted exit. For scores too.

    Raises:
        InputError: a layer below 1.
    """

    for_regression: ClassVar[bool] = True

    layer: int

    def __post_init__(self):
        set_count(self, "layer", least=1)

    def init(self, logits, row):
        del row
        return jnp.zeros_like(logits[:, 0], bool)

    def update(self, state, logits, layer):
        del logits
        return state, state | (layer == self.layer)

    @classmethod
    def families(cls, logits, count):
        del count
        return {"": [cls(layer) for layer in range(len(logits), 0, -1)]}

    def warnings(self, num_layers: int, is_regression: bool) -> list[str]:
        del is_regression
        if self.layer < num_layers:
            return []
        return [f"layer {self.layer} saves nothing on {num_layers} layers"]


@registered()
@dataclasses.dataclass(frozen=True)
class Oracle(Criterion):
    """Every row leaves at the first exit that is right, else at the last: the upper bound.

    It needs the labels, so it works in `replay` only, and no checkpoint can keep it.

    Attributes:
        labels: (N,) class ids or scores by the row's index in the call.
        tolerance: a score is right when its error is at most this.

    Raises:
        InputError: a tolerance below 0.
    """

    for_regression: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True

    labels: np.ndarray | Array
    tolerance: float = 0.0

    def __post_init__(self):
        set_number(self, "tolerance", 0)

    def init(self, logits, row):
        del logits
        return jnp.asarray(self.labels)[row]

    def update(self, state, logits, layer):
        del layer
        found = predictions(logits)
        if logits.shape[1] == 1:
            return state, jnp.abs(found - state) <= self.tolerance
        return state, found == state
