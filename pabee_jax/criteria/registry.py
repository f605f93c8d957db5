"""The registry of exit criteria: registers their classes as pytrees and by name."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from pabee_jax.criteria.base import ExitCriterion
from pabee_jax.errors import InputError, shown

# The criterion classes by their names in `config.json` and on the command line.
CRITERIA: dict[str, type] = {}
_registered: set[type] = set()
Kind = TypeVar("Kind", bound=type)


def registered(name: str | None = None) -> Callable[[Kind], Kind]:
    """Return a class decorator that registers a frozen dataclass as a criterion.

    The decorator registers the class as a pytree whose leaves are its fields and, if `name` is
    given, adds the class to `CRITERIA`.

    `jax.tree_util.register_dataclass` must not be used: the treedefs of two classes with the same
    number of fields compare equal (jax 0.10). On a hash collision, `jit` may then run the program
    of the other class.
    """

    def register(kind: Kind) -> Kind:
        fields = [field.name for field in dataclasses.fields(kind)]
        paths = [jax.tree_util.GetAttrKey(field) for field in fields]

        def children(criterion):
            return [(path, getattr(criterion, path.name)) for path in paths], None

        def rebuild(_, leaves):
            return kind(**dict(zip(fields, leaves, strict=True)))

        jax.tree_util.register_pytree_with_keys(kind, children, rebuild)
        _registered.add(kind)
        if name:
            CRITERIA[name] = kind
        return kind

    return register


def as_arrays(criterion: ExitCriterion) -> ExitCriterion:
    """Return the criterion with leaves of fixed dtypes: int32 and float32.

    Call before a criterion is passed to `jit`, which compiles separate programs for a Python int
    and an np.int64.

    Raises:
        InputError: the criterion's class is not decorated with `registered`, or a field is not a
            number where its annotation is int or float, and otherwise not made of numbers.
    """
    if type(criterion) not in _registered:
        raise InputError(
            f"{type(criterion).__name__} is not a registered criterion: decorate its class with "
            "@pabee_jax.criteria.registered()"
        )
    _check_fields(criterion)
    types = {int: np.int32, float: np.float32}
    return jax.tree.map(lambda leaf: np.asarray(leaf, types.get(type(leaf))), criterion)


def _check_fields(criterion: Any) -> None:
    """Raise InputError if a field does not hold numbers.

    A criterion's `__post_init__` cannot refuse these values, because JAX rebuilds pytrees with
    placeholders as leaves.
    """
    for field in dataclasses.fields(criterion):
        value = getattr(criterion, field.name)
        if is_number(field):
            is_valid, required = _is_numeric(value) and np.shape(value) == (), "a number"
        else:
            is_valid, required = all(map(_is_numeric, jax.tree.leaves(value))), "made of numbers"
        if not is_valid:
            name = f"{type(criterion).__name__}.{field.name}"
            raise InputError(f"{name} is {shown(value)}; it must be {required}")


def is_number(field: dataclasses.Field) -> bool:
    """Return whether a field of a criterion is one number, and not an array of numbers."""
    return field.type in (int, float, "int", "float")


def _is_numeric(value: Any) -> bool:
    if isinstance(value, int | float | jax.Array):
        return True
    try:
        return np.asarray(value).dtype.kind in "iufb"
    except ValueError:  # A list whose items have unequal lengths, or of more than 64 levels.
        return False
