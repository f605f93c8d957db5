"""What every exit criterion offers to the drivers, and what they share."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from pabee_jax.errors import InputError

State = TypeVar("State")
Layer = int | Int[Array, ""]
Logits = Float[Array, "rows classes"]
Rows = Bool[Array, " rows"]

# Every criterion of this package by its name in `config.json` and on the command line.
CRITERIA: dict[str, type] = {}
_registered: set[type] = set()
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


Kind = TypeVar("Kind", bound=type)


def registered(name: str | None = None) -> Callable[[Kind], Kind]:
    """Decorates a frozen dataclass: a pytree whose fields are leaves, and known by `name`.

    Not `jax.tree_util.register_dataclass`: the treedefs of two such classes with as many fields
    compare equal (jax 0.10), so that `jit` may, if the hashes also agree in the bits that a table
    looks at, run the program of one class for the other.
    """

    def register(kind: Kind) -> Kind:
        fields = [field.name for field in dataclasses.fields(kind)]
        keys = [jax.tree_util.GetAttrKey(field) for field in fields]

        def children(criterion):
            return [(key, getattr(criterion, key.name)) for key in keys], None

        def rebuild(_, leaves):
            return kind(**dict(zip(fields, leaves, strict=True)))

        jax.tree_util.register_pytree_with_keys(kind, children, rebuild)
        _registered.add(kind)
        if name:
            CRITERIA[name] = kind
        return kind

    return register


def check(criterion: ExitCriterion, is_regression: bool) -> None:
    """Raises InputError for a criterion that cannot be used with such a model in a driver."""
    name = type(criterion).__name__
    if criterion.needs_labels:
        raise InputError(f"{name} needs the labels: it works on recorded logits only (replay)")
    check_task(type(criterion), is_regression)


def check_task(kind: type[ExitCriterion], is_regression: bool) -> None:
    """Raises InputError for a criterion of classes and a model of scores."""
    if is_regression and not kind.for_regression:
        fitting = [one.__name__ for one in CRITERIA.values() if one.for_regression]
        raise InputError(
            f"{kind.__name__} is for classification; for scores there are {', '.join(fitting)}"
        )


def warn(criterion: ExitCriterion, num_layers: int, is_regression: bool) -> None:
    """Logs the criterion's warnings for a model, each one once per process."""
    for message in criterion.warnings(num_layers, is_regression):
        _warn_once(message)


@functools.cache
def _warn_once(message: str) -> None:
    logging.warning("%s", message)


def as_arrays(criterion: ExitCriterion) -> ExitCriterion:
    """The criterion with one fixed type per leaf; called where a criterion enters `jit`.

    A Python int and an np.int64 are different types to `jit` and would compile twice.

    Raises:
        InputError: its class is not decorated with `registered`.
    """
    if type(criterion) not in _registered:
        raise InputError(
            f"{type(criterion).__name__} is no criterion that can be compiled: decorate its class "
            "with @pabee_jax.criteria.registered()"
        )
    types = {int: np.int32, float: np.float32}
    return jax.tree.map(lambda leaf: np.asarray(leaf, types.get(type(leaf))), criterion)


def predictions(logits: Logits) -> Array:
    """(rows,) class ids (int32; ties go to the lowest), or scores."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    return jnp.argmax(logits, axis=1).astype(jnp.int32)


def quantiles(values: ArrayLike, count: int) -> list[float]:
    """`count` thresholds from the lowest to the highest of the values, each at most once."""
    found = np.quantile(np.asarray(values, np.float64), np.linspace(0, 1, count))
    return np.unique(found).tolist()


def set_count(criterion: Any, name: str, least: int) -> None:
    """Makes a field of a frozen dataclass a plain int, or raises InputError.

    Unflattening a pytree calls `__init__` with tracers and placeholders too; only what a person
    gave is checked. (6 and np.int64(6) must share a program.)
    """
    value = getattr(criterion, name)
    if not _is_concrete(value):
        return
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or not least <= value < 2**31:
        raise InputError(f"{name} must be a whole number, {least} or more, not {value!r}")
    object.__setattr__(criterion, name, int(value))


def set_number(criterion: Any, name: str, least: float = -math.inf, most: float = math.inf) -> None:
    """Makes a field of a frozen dataclass a plain float from `least` to `most`; see `set_count`."""
    value = getattr(criterion, name)
    if not _is_concrete(value):
        return
    limits = f" from {least:g} to {most:g}" if math.isfinite(least) else ""
    number = not isinstance(value, (str, bool)) and least <= value <= most
    if not number:
        raise InputError(f"{name} must be a number{limits}, not {value!r}")
    object.__setattr__(criterion, name, float(value))


def _is_concrete(value: Any) -> bool:
    return isinstance(value, (int, float, str, np.integer, np.floating))
