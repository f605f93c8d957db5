"""The registry of exit criteria: each class as a pytree, and by its name."""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np

from pabee_jax.criteria.base import ExitCriterion
from pabee_jax.errors import InputError

# Every criterion of this package by its name in `config.json` and on the command line.
CRITERIA: dict[str, type] = {}
_registered: set[type] = set()
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
