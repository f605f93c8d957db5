"""Criteria as people read and write them, and as `config.json` keeps them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pabee_jax.criteria.base import ExitCriterion
from pabee_jax.criteria.registry import CRITERIA
from pabee_jax.errors import InputError


def describe(criterion: ExitCriterion) -> str:
    """A setting as people read it: "patience 3", "entropy, threshold 0.3"."""
    name = name_of(criterion)
    words = [name]
    for field in dataclasses.fields(criterion):
        value = getattr(criterion, field.name)
        if not isinstance(value, (int, float)) or value == field.default:
            continue
        if field.name == name:
            words = [f"{name} {value:g}"]
        else:
            words.append(f"{field.name} {value:.4g}")
    return ", ".join(words)


def name_of(criterion: ExitCriterion) -> str:
    """Its name in `config.json`; of a class that cannot be kept there, the class's own."""
    kind = type(criterion)
    return next((name for name, one in CRITERIA.items() if one is kind), kind.__name__.lower())


def parse(text: str) -> ExitCriterion:
    """A setting from the command line: "entropy:threshold=0.3", "vote:votes=3".

    Raises:
        InputError: an unknown criterion or field, a field without a value, a bad value.
    """
    name, _, fields = text.partition(":")
    values: dict[str, Any] = {"criterion": name}
    for part in fields.split(",") if fields else ():
        field, _, number = part.partition("=")
        try:
            values[field] = float(number) if "." in number or "e" in number else int(number)
        except ValueError:
            raise InputError(
                f"{text!r}: {part!r} is not FIELD=NUMBER, as in entropy:threshold=0.3"
            ) from None
    kind = criterion_class(name)
    wanted = [field.name for field in dataclasses.fields(kind)]
    needed = [field.name for field in dataclasses.fields(kind) if _has_no_default(field)]
    for field in values.keys() - {"criterion"}:
        if field not in wanted:
            raise InputError(f"{text!r}: {name} has no {field!r}; it has {', '.join(wanted)}")
    if missing := [field for field in needed if field not in values]:
        raise InputError(f"{text!r} lacks {' and '.join(f'{each}=NUMBER' for each in missing)}")
    return from_config(values)


def criterion_class(name: str | None) -> type:
    """The criterion of that name.

    Raises:
        InputError: there is none.
    """
    if name not in CRITERIA:
        raise InputError(f"unknown exit criterion {name!r}; known are {', '.join(CRITERIA)}")
    return CRITERIA[name]


def to_config(criterion: ExitCriterion) -> dict[str, Any]:
    """The criterion as JSON values, as `config.json` keeps it under `early_exit`.

    Raises:
        InputError: a class of the user's own, which another process could not find.
    """
    if type(criterion) not in CRITERIA.values():
        raise InputError(
            f"config.json can keep one of {', '.join(CRITERIA)}, not {type(criterion).__name__}"
        )
    return {"criterion": name_of(criterion), **dataclasses.asdict(criterion)}


def from_config(values: Mapping[str, Any]) -> ExitCriterion:
    """The inverse of `to_config`; what a calibration left under `guarantee` is for people.

    Raises:
        InputError: an unknown criterion or field.
    """
    parameters = dict(values)
    name = parameters.pop("criterion", None)
    parameters.pop("guarantee", None)
    kind = criterion_class(name)
    try:
        return kind(**parameters)
    except TypeError as error:
        raise InputError(f"the exit criterion {name!r} does not fit its class: {error}") from None


def _has_no_default(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING
