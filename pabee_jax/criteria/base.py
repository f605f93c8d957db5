"""The interface between exit criteria and drivers, and helpers that the criteria share."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

State = TypeVar("State")
Layer = int | Int[Array, ""]
Logits = Float[Array, "rows classes"]
Rows = Bool[Array, " rows"]

# Of criteria that have a patience and a threshold, a sweep tries these with every threshold.
SWEPT_PATIENCES = (1, 2, 3)


@runtime_checkable
class ExitCriterion(Protocol[State]):
    """What a driver asks after each layer.

    A criterion is a frozen dataclass decorated with `registered`: a pytree whose thresholds are
    leaves, so that a new threshold does not recompile. It works on each row by itself and every
    leaf of the state has the row axis first, so a driver may slice, pad and permute rows. The
    driver, not the criterion, forces the exit at the last layer. `Criterion` has defaults for all
    but the first two methods.

    Attributes:
        for_regression: whether it can judge scores (one output), and not only classes.
        needs_labels: whether it must know the right answers, so that only `replay` can use it.
    """

    for_regression: ClassVar[bool]
    needs_labels: ClassVar[bool]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def init(self, logits: Logits, row: Int[Array, " rows"]) -> State:
        """The state before layer 1.

        `logits` is an array of zeros derived from the batch (for its shape and sharding); `row` is
        each row's index in the call, through which per-row parameters are gathered.
        """
        ...

    def update(self, state: State, logits: Logits, layer: Layer) -> tuple[State, Rows]:
        """The next state, and which rows exit at `layer` (from 1, possibly traced)."""
        ...

    def answer(self, state: State, logits: Logits) -> Logits:
        """What a row answers that leaves at this layer, from the state after `update`."""
        ...

    def warnings(self, num_layers: int, is_regression: bool) -> list[str]:
        """What is legal with this model but surely not meant, as sentences."""
        ...

    @classmethod
    def families(cls, logits: np.ndarray, count: int) -> Mapping[str, Sequence["ExitCriterion"]]:
        """Settings over the whole range, from slow to fast, for a sweep.

        By the name of the family, which says what they share; `count` settings of a threshold each,
        from the quantiles of what (exits, rows, classes) logits give.
        """
        ...


class Criterion:
    """Defaults: for classes, without labels, a row answers with the logits of its exit."""

    for_regression: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False

    def answer(self, state: Any, logits: Logits) -> Logits:
        del state
        return logits

    def warnings(self, num_layers: int, is_regression: bool) -> list[str]:
        del num_layers, is_regression
        return []

    @classmethod
    def families(cls, logits: np.ndarray, count: int) -> Mapping[str, Sequence[Any]]:
        del logits, count
        return {}


def predictions(logits: Logits) -> Array:
    """(rows,) class ids (int32; ties go to the lowest), or scores."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    return jnp.argmax(logits, axis=1).astype(jnp.int32)


def quantiles(values: ArrayLike, count: int) -> list[float]:
    """`count` thresholds from the lowest to the highest of the values, each at most once."""
    found = np.quantile(np.asarray(values, np.float64), np.linspace(0, 1, count))
    return np.unique(found).tolist()
