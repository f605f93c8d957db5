"""Baselines for other criteria: one fixed exit layer for all rows, and the best exit per row."""

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
    """Exit every row at layer `layer` (budgeted exit). For classification and regression.

    Attributes:
        layer: the exit layer, from 1.

    Raises:
        InputError: `layer` is below 1.
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

    def uses_early_exits(self, num_layers: int, is_regression: bool) -> bool:
        del is_regression
        return self.layer < num_layers

    def warnings(self, num_layers: int, is_regression: bool) -> list[str]:
        if self.uses_early_exits(num_layers, is_regression):
            return []
        return [f"fixed layer {self.layer} on {num_layers} layers allows no early exit"]


@registered()
@dataclasses.dataclass(frozen=True)
class Oracle(Criterion):
    """Exit every row at the first exit with a correct prediction: the upper bound of a criterion.

    A row without a correct prediction exits at the last layer. `Oracle` needs the labels, so only
    `replay` can use it, and it cannot be saved in a checkpoint.

    Attributes:
        labels: (N,) class ids or scores by the row's index in the call; one label per row.
        tolerance: the largest error of a correct score, in units of the score.

    Example:
        >>> logits = np.array([[[2.0, 0.0]], [[0.0, 1.0]], [[0.0, 2.0]], [[0.0, 3.0]]])
        >>> exit_layers, _ = replay(Oracle(np.array([1])), logits)
        >>> exit_layers.tolist()
        [2]

    Raises:
        InputError: `tolerance` is below 0.
    """

    for_regression: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True

    labels: np.ndarray | Array
    tolerance: float = 0.0

    def __post_init__(self):
        set_number(self, "tolerance", 0)
        if isinstance(self.labels, list | tuple):  # Each label would be a leaf of the pytree.
            object.__setattr__(self, "labels", np.asarray(self.labels))

    def init(self, logits, row):
        del logits
        return jnp.asarray(self.labels)[row]

    def update(self, state, logits, layer):
        del layer
        prediction = predictions(logits)
        if logits.shape[1] == 1:
            return state, jnp.abs(prediction - state) <= self.tolerance
        return state, prediction == state
