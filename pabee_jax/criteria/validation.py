"""Checks of a criterion's own fields, and of a criterion against a model."""

import functools
import math
from typing import Any

import numpy as np
from absl import logging

from pabee_jax.criteria.base import ExitCriterion
from pabee_jax.criteria.registry import CRITERIA
from pabee_jax.errors import InputError


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
