"""Criteria as text: descriptions, command-line arguments, and values of `config.json`."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from pabee_jax.criteria.base import ExitCriterion
from pabee_jax.criteria.registry import CRITERIA, as_arrays, is_number
from pabee_jax.errors import InputError, shown


def describe(criterion: ExitCriterion) -> str:
    """Return a setting as readable text: "patience 3", "entropy, threshold 0.3"."""
    name = name_of(criterion)
    words = [name]
    for field in _fields(criterion):
        value = getattr(criterion, field.name)
        if not isinstance(value, (int, float)) or value == field.default:
            continue
        if field.name == name:
            words = [f"{name} {value:g}"]
        else:
            words.append(f"{field.name} {value:.4g}")
    return ", ".join(words)


def name_of(criterion: ExitCriterion) -> str:
    """Return the criterion's name in `config.json`.

    For a class that is not in `CRITERIA`, return the name of the class in lower case.
    """
    kind = type(criterion)
    names = (name for name, registered_class in CRITERIA.items() if registered_class is kind)
    return next(names, kind.__name__.lower())


def parse(text: str) -> ExitCriterion:
    """Return the criterion for a command-line argument.

    Example:
        >>> parse("entropy:threshold=0.3")
        Entropy(threshold=0.3)

    Raises:
        InputError: the criterion or a field is unknown, a required field is missing, a field is
            given twice, or a value is not a finite number or out of range.
    """
    name, _, fields = text.partition(":")
    values: dict[str, Any] = {"criterion": name}
    for part in fields.split(",") if fields else ():
        field, _, number = (piece.strip() for piece in part.partition("="))
        if field in values:
            raise InputError(f"{text!r} gives {field} twice; give it once")
        try:
            values[field] = _number(number)
        except ValueError:
            raise InputError(
                f"{text!r}: {part!r} is not FIELD=NUMBER, as in entropy:threshold=0.3"
            ) from None
    kind = criterion_class(name)
    known = [field.name for field in dataclasses.fields(kind)]
    required = [field.name for field in dataclasses.fields(kind) if _has_no_default(field)]
    for field in values.keys() - {"criterion"}:
        if field not in known:
            raise InputError(f"{text!r}: {name} has no {field!r}; it has {', '.join(known)}")
    if unwritable := [field.name for field in dataclasses.fields(kind) if not is_number(field)]:
        raise InputError(
            f"{text!r}: {' and '.join(unwritable)} of {name} cannot be written as FIELD=NUMBER: "
            "use --sweep or --calibrate, which fit the criterion, or Python"
        )
    if missing := [field for field in required if field not in values]:
        raise InputError(f"{text!r} lacks {' and '.join(f'{field}=NUMBER' for field in missing)}")
    for field in dataclasses.fields(kind):
        if field.type in (float, "float") and field.name in values:
            values[field.name] = float(values[field.name])
    return from_config(values)


def _number(text: str) -> int | float:
    """Return a finite number in any spelling of Python: an int for a whole number.

    Raises:
        ValueError: the text is not a finite number.
    """
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    try:
        return int(text)
    except ValueError:
        return int(number) if number.is_integer() else number


def criterion_class(name: str | None) -> type:
    """Return the criterion class with this name.

    Raises:
        InputError: `CRITERIA` has no such name.
    """
    if not isinstance(name, str) or name not in CRITERIA:
        raise InputError(
            f"unknown exit criterion {shown(name)}; known are {', '.join(CRITERIA)}, and those of "
            "modules that are imported before (in a command: --plugin FILE.py)"
        )
    return CRITERIA[name]


def to_config(criterion: ExitCriterion) -> dict[str, Any]:
    """Return the criterion as JSON values, for `early_exit` in `config.json`.

    Example:
        >>> to_config(Patience(3))
        {'criterion': 'patience', 'patience': 3, 'regression_threshold': 0.0}

    Raises:
        InputError: the class is not in `CRITERIA`, so that another process could not restore it.
    """
    if type(criterion) not in CRITERIA.values():
        raise InputError(
            f"{type(criterion).__name__} cannot be saved in config.json; the criteria that can be "
            f"saved are {', '.join(CRITERIA)}"
        )
    values = {field.name: getattr(criterion, field.name) for field in _fields(criterion)}
    lists = {name: np.asarray(v).tolist() for name, v in values.items() if np.ndim(v)}
    return {"criterion": name_of(criterion), **values, **lists}


def from_config(values: Mapping[str, Any]) -> ExitCriterion:
    """Return the criterion for the JSON values of `to_config`.

    `guarantee`, which risk control adds to the values for readers, is ignored.

    Raises:
        InputError: the criterion or a field is unknown, or a value is not a number or out of range.
    """
    if not isinstance(values, Mapping):
        raise InputError(
            f"an exit criterion is {shown(values)}; it must be an object, such as "
            '{"criterion": "patience", "patience": 3}'
        )
    parameters = dict(values)
    name = parameters.pop("criterion", None)
    parameters.pop("guarantee", None)
    kind = criterion_class(name)
    try:
        criterion = kind(**parameters)
    except TypeError as error:
        raise InputError(f"the exit criterion {name!r} does not fit its class: {error}") from None
    as_arrays(criterion)  # Checks the values that the class cannot check.
    return criterion


def _has_no_default(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING


def _fields(criterion: Any) -> tuple[dataclasses.Field, ...]:
    # A criterion is a dataclass, which a `Protocol` cannot say.
    return dataclasses.fields(criterion)
