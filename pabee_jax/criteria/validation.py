"""Validation of a criterion's fields, and of a criterion for a model."""

import functools
import math
from typing import Any

import numpy as np
from absl import logging

from pabee_jax.criteria.base import ExitCriterion
from pabee_jax.criteria.registry import CRITERIA, as_arrays
from pabee_jax.criteria.text import describe
from pabee_jax.errors import InputError, shown

# For messages about a checkpoint that is an ordinary classifier.
ONLY_LAST_EXIT = (
    "only the last exit was, which is the head of the classifier; train the others with "
    "pabee-jax train --config attach"
)


def set_count(criterion: Any, name: str, least: int, most: int = 2**31 - 1) -> None:
    """Convert a field of a frozen dataclass to a Python int, or raise InputError.

    6 and np.int64(6) must share a compiled program. Only concrete values are checked, because
    unflattening a pytree also calls `__init__`, with tracers and placeholders.
    """
    value = getattr(criterion, name)
    if not _is_concrete(value):
        return
    is_whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_whole or not least <= value <= most:
        limits = f"{least} or more" if most == 2**31 - 1 else f"from {least} to {most}"
        raise InputError(f"{name} must be a whole number, {limits}, not {shown(value)}")
    object.__setattr__(criterion, name, int(value))


def set_number(criterion: Any, name: str, least: float = -math.inf, most: float = math.inf) -> None:
    """Convert a field of a frozen dataclass to a Python float, or raise InputError.

    The value must be from `least` to `most`. As in `set_count`, only concrete values are checked.
    """
    value = getattr(criterion, name)
    if not _is_concrete(value):
        return
    limits = f" from {least:g} to {most:g}" if math.isfinite(least) else ""
    try:
        number = math.nan if isinstance(value, (str, bool)) else float(value)
    except OverflowError:  # An int with hundreds of digits.
        number = math.nan
    if not least <= number <= most:
        raise InputError(f"{name} must be a number{limits}, not {shown(value)}")
    object.__setattr__(criterion, name, number)


def _is_concrete(value: Any) -> bool:
    return isinstance(value, (int, float, str, np.integer, np.floating))


def check(
    criterion: ExitCriterion, num_layers: int, num_labels: int, trained_exits: str = "all"
) -> None:
    """Raise InputError if a driver cannot use the criterion with a model.

    Args:
        criterion: the criterion.
        num_layers: the number of layers of the model.
        num_labels: the number of outputs; 1 means that the model is for regression.
        trained_exits: the exits of the model that were trained. With "last", a criterion that may
            use another exit is refused; with "none", all parameters are random, which is for tests.
    """
    name = type(criterion).__name__
    if isinstance(criterion, type) or not isinstance(criterion, ExitCriterion):
        raise InputError(
            f"criterion is {criterion!r}; it must be an exit criterion, such as Patience(3)"
        )
    if criterion.needs_labels:
        raise InputError(f"{name} needs the labels; use it on recorded logits, with replay")
    check_task(type(criterion), num_labels == 1)
    criterion.check_model(num_layers, num_labels)
    as_arrays(criterion)  # Checks the values that the class cannot check.
    if trained_exits == "last" and criterion.uses_early_exits(num_layers, num_labels == 1):
        raise InputError(
            f"{describe(criterion)} may use exits that were never trained: {ONLY_LAST_EXIT}, or "
            "run all layers with patience 0"
        )


def check_labels(criterion: ExitCriterion, num_rows: int) -> None:
    """Raise InputError if a criterion that needs the labels has not one label per row.

    A compiled program does not fail for a row without a label: it takes the last label.
    """
    if not criterion.needs_labels:
        return
    shape = np.shape(getattr(criterion, "labels", ()))
    if shape != (num_rows,):
        raise InputError(
            f"{type(criterion).__name__} has labels of shape {shape}, but the logits have "
            f"{num_rows} rows: it needs one label per row"
        )


def check_task(kind: type[ExitCriterion], is_regression: bool) -> None:
    """Raise InputError if the model is for regression and the criterion is not."""
    if is_regression and not kind.for_regression:
        names = [known.__name__ for known in CRITERIA.values() if known.for_regression]
        raise InputError(
            f"{kind.__name__} is for classification; the criteria for regression are "
            f"{', '.join(names)}"
        )


def warn(criterion: ExitCriterion, num_layers: int, is_regression: bool) -> None:
    """Log the criterion's warnings for a model; the same warning is logged once per process."""
    for message in criterion.warnings(num_layers, is_regression):
        _warn_once(message)


@functools.cache
def _warn_once(message: str) -> None:
    logging.warning("%s", message)
