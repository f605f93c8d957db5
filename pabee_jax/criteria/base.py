"""The interface between exit criteria and drivers, and functions that the criteria share."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

State = TypeVar("State")
Layer = int | Int[Array, ""]
Logits = Float[Array, "rows classes"]
Rows = Bool[Array, " rows"]

# A sweep of a criterion with a patience and a threshold combines these patiences with every
# threshold.
SWEPT_PATIENCES = (1, 2, 3)


@runtime_checkable
class ExitCriterion(Protocol[State]):
    """The protocol of exit criteria, which a driver calls after each layer.

    A criterion is a frozen dataclass decorated with `registered`: a pytree whose thresholds are
    leaves, so that a new threshold does not recompile. A criterion treats rows independently, and
    the first axis of every leaf of its state is the row, so a driver may slice, pad and permute
    rows. The driver, not the criterion, forces the exit at the last layer. `Criterion` has defaults
    for all methods except `init` and `update`.

    Attributes:
        for_regression: whether the criterion can be used for regression (one output).
        needs_labels: whether the criterion needs the labels, so that only `replay` can use it.
    """

    for_regression: ClassVar[bool]
    needs_labels: ClassVar[bool]

    def init(self, logits: Logits, row: Int[Array, " rows"]) -> State:
        """Return the state before layer 1.

        Args:
            logits: zeros with the shape and sharding of the batch's logits.
            row: the index of each row in the call, for criteria with per-row parameters.
        """
        ...

    def update(self, state: State, logits: Logits, layer: Layer) -> tuple[State, Rows]:
        """Return the next state and the mask of rows that exit at `layer`.

        `layer` counts from 1 and may be traced.
        """
        ...

    def answer(self, state: State, logits: Logits) -> Logits:
        """Return the output of the rows that exit at this layer.

        `state` is the state that `update` returned at this layer.
        """
        ...

    def check_model(self, num_layers: int, num_labels: int) -> None:
        """Raise InputError if the criterion cannot be used on a model of this shape."""
        ...

    def uses_early_exits(self, num_layers: int, is_regression: bool) -> bool:
        """Return whether an answer may depend on an exit before the last one.

        A criterion with which every row gets the answer of the last exit can be used on a model
        whose other exits are not trained.
        """
        ...

    def warnings(self, num_layers: int, is_regression: bool) -> list[str]:
        """Return warnings about settings that are valid for this model but have no effect."""
        ...

    @classmethod
    def families(cls, logits: np.ndarray, count: int) -> Mapping[str, Sequence["ExitCriterion"]]:
        """Return the settings of a sweep by family name, in each family from slow to fast.

        A family's name describes the fields that its settings share, such as "patience 2".

        Args:
            logits: (exits, rows, classes) recorded logits; thresholds are quantiles of the
                criterion's measure on these logits.
            count: the number of thresholds per family.
        """
        ...


class Criterion:
    """Base class with defaults: classification, no labels, the exit's logits as the output."""

    for_regression: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False

    def answer(self, state: Any, logits: Logits) -> Logits:
        del state
        return logits

    def check_model(self, num_layers: int, num_labels: int) -> None:
        del num_layers, num_labels

    def uses_early_exits(self, num_layers: int, is_regression: bool) -> bool:
        del is_regression
        return num_layers > 1

    def warnings(self, num_layers: int, is_regression: bool) -> list[str]:
        del num_layers, is_regression
        return []

    @classmethod
    def families(cls, logits: np.ndarray, count: int) -> Mapping[str, Sequence[Any]]:
        del logits, count
        return {}


def predictions(logits: Logits) -> Array:
    """Return (rows,) class ids (int32; the lowest of tied classes) or, for regression, scores."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    return jnp.argmax(logits, axis=1).astype(jnp.int32)


def quantiles(values: ArrayLike, count: int) -> list[float]:
    """Return `count` quantiles of `values` from the minimum to the maximum, without duplicates.

    Without values (a model of one layer has no pairs of neighboring exits), there are no quantiles.
    """
    values = np.asarray(values, np.float64)
    if not values.size:
        return []
    thresholds = np.quantile(values, np.linspace(0, 1, count))
    return np.unique(thresholds).tolist()
