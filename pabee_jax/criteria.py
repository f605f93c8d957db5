"""Exit criteria: when has a row seen enough layers? The only place that knows what patience is."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Bool, Float, Int

from pabee_jax.errors import InputError

State = TypeVar("State")
Layer = int | Int[Array, ""]


@runtime_checkable
class ExitCriterion(Protocol[State]):
    """What a driver asks after each layer.

    A criterion is a frozen dataclass registered as a pytree whose thresholds are leaves, so that a
    new threshold does not recompile. `update` works on each row by itself and every leaf of the
    state has the row axis first, so a driver may slice, pad and permute rows. The driver, not the
    criterion, forces the exit at the last layer.
    """

    def init(self, logits: Float[Array, "rows classes"], row: Int[Array, " rows"]) -> State:
        """The state before layer 1.

        `logits` is an array of zeros derived from the batch (for its shape and sharding); `row` is
        each row's index in the call, through which per-row parameters are gathered.
        """
        ...

    def update(
        self, state: State, logits: Float[Array, "rows classes"], layer: Layer
    ) -> tuple[State, Bool[Array, " rows"]]:
        """The next state, and which rows exit at `layer` (from 1, possibly traced)."""
        ...

    def warnings(self, num_layers: int, is_regression: bool) -> list[str]:
        """What is legal with this model but surely not meant, as sentences."""
        ...


class PatienceState(NamedTuple):
    """Attributes:
    counter: (rows,) int32, how many times in a row the exits have agreed.
    prediction: (rows,) the previous exit's class (int32) or score (float32).
    """

    counter: Array
    prediction: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Patience:
    """Exit once the classifiers agreed `patience` times in a row (PABEE, section 3.2).

    The earliest exit is layer `patience + 1`. Two classes agree when they are equal (ties go to the
    lowest index), two scores when they differ by less than `regression_threshold` (strictly).

    Attributes:
        patience: agreements needed, at least 0; 0 means no early exit.
        regression_threshold: for regression only, in units of the score.

    Raises:
        InputError: a negative or fractional patience, or a threshold that is not a number.
    """

    patience: int
    regression_threshold: float = 0.0

    def __post_init__(self):
        # Unflattening calls __init__ with tracers and placeholders too; only a person's values are
        # checked. They become plain int and float here so that 6 and np.int64(6) share a program.
        patience, threshold = self.patience, self.regression_threshold
        if _is_concrete(patience):
            whole = isinstance(patience, (int, np.integer)) and not isinstance(patience, bool)
            if not whole or not 0 <= patience < 2**31:
                raise InputError(f"patience must be a whole number, 0 or more, not {patience!r}")
            object.__setattr__(self, "patience", int(patience))
        if _is_concrete(threshold):
            if isinstance(threshold, str) or math.isnan(threshold):
                raise InputError(f"regression_threshold must be a number, not {threshold!r}")
            object.__setattr__(self, "regression_threshold", float(threshold))

    def init(self, logits, row):
        del row
        return PatienceState(jnp.zeros_like(logits[:, 0], jnp.int32), _predictions(logits))

    def update(self, state, logits, layer):
        prediction = _predictions(logits)
        if logits.shape[1] == 1:
            agree = jnp.abs(prediction - state.prediction) < self.regression_threshold
        else:
            agree = prediction == state.prediction
        counter = jnp.where(agree & (layer > 1), state.counter + 1, 0)
        leaves = (self.patience > 0) & (counter == self.patience)
        return PatienceState(counter, prediction), leaves

    def warnings(self, num_layers: int, is_regression: bool) -> list[str]:
        found = []
        if self.patience >= num_layers - 1:
            found.append(f"patience {self.patience} saves nothing on {num_layers} layers")
        if is_regression and self.patience > 0 and self.regression_threshold <= 0:
            found.append(
                f"with regression_threshold {self.regression_threshold:g} no row ever exits early"
            )
        return found


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaxProbability:
    """Exit at the first layer whose highest class probability is above `threshold` (strictly).

    For classification (Shallow-Deep Networks, section 5; RightTool).

    Attributes:
        threshold: from 0 to 1; 1 means no early exit.

    Raises:
        InputError: a threshold that is no number from 0 to 1.
    """

    threshold: float

    def __post_init__(self):
        if _is_concrete(self.threshold):
            number = not isinstance(self.threshold, (str, bool))
            if not number or not 0 <= self.threshold <= 1:
                raise InputError(f"threshold must be from 0 to 1, not {self.threshold!r}")
            object.__setattr__(self, "threshold", float(self.threshold))

    def init(self, logits, row):
        del logits, row
        return ()

    def update(self, state, logits, layer):
        del layer
        return state, jax.nn.softmax(logits).max(axis=1) > self.threshold

    def warnings(self, num_layers: int, is_regression: bool) -> list[str]:
        del num_layers
        return (
            ["MaxProbability is for classes: a score has no probability"] if is_regression else []
        )


CRITERIA = {"patience": Patience, "max_probability": MaxProbability}


def warn(criterion: ExitCriterion, num_layers: int, is_regression: bool) -> None:
    """Logs the criterion's warnings for a model, each one once per process."""
    for message in criterion.warnings(num_layers, is_regression):
        _warn_once(message)


@functools.cache
def _warn_once(message: str) -> None:
    logging.warning("%s", message)


def to_config(criterion: ExitCriterion) -> dict[str, Any]:
    """The criterion as JSON values, as `config.json` keeps it under `early_exit`.

    Raises:
        InputError: a class of the user's own, which another process could not find.
    """
    for name, kind in CRITERIA.items():
        if type(criterion) is kind:
            return {"criterion": name, **dataclasses.asdict(criterion)}
    raise InputError(
        f"config.json can keep one of {', '.join(CRITERIA)}, not {type(criterion).__name__}"
    )


def from_config(values: Mapping[str, Any]) -> ExitCriterion:
    """The inverse of `to_config`.

    Raises:
        InputError: an unknown criterion or field.
    """
    parameters = dict(values)
    name = parameters.pop("criterion", None)
    if name not in CRITERIA:
        raise InputError(f"unknown exit criterion {name!r}; known are {', '.join(CRITERIA)}")
    try:
        return CRITERIA[name](**parameters)
    except TypeError as error:
        raise InputError(f"the exit criterion {name!r} does not fit its class: {error}") from None


def as_arrays(criterion: ExitCriterion) -> ExitCriterion:
    """The criterion with one fixed type per leaf; called where a criterion enters `jit`.

    A Python int and an np.int64 are different types to `jit` and would compile twice.
    """
    types = {int: np.int32, float: np.float32}
    return jax.tree.map(lambda leaf: np.asarray(leaf, types.get(type(leaf))), criterion)


def _is_concrete(value: Any) -> bool:
    return isinstance(value, (int, float, str, np.integer, np.floating))


def _predictions(logits: Float[Array, "rows classes"]) -> Array:
    if logits.shape[1] == 1:
        return logits[:, 0]
    return jnp.argmax(logits, axis=1).astype(jnp.int32)
