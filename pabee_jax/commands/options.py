"""The options of a command as one dataclass: its fields become absl flags."""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from absl import flags

from pabee_jax.errors import InputError

Options = TypeVar("Options")


def option(help: str, default: Any = None) -> Any:
    """Declare a field of an options dataclass: its help text and its default."""
    return dataclasses.field(default=default, metadata={"help": help})


def define_flags(kind: type, flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Define a flag for every field of the options dataclass `kind`.

    The type of a field decides how its flag is parsed: `str`, `bool`, `int` or `float`, each also
    with `| None`; a flag of type `tuple[str, ...]` may be given several times.
    """
    types = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        define = _DEFINE[types[field.name]]
        define(field.name, field.default, field.metadata["help"], flag_values=flag_values)


def read_flags(kind: type[Options], flag_values: flags.FlagValues = flags.FLAGS) -> Options:
    """Return the options that were given on the command line.

    Raises:
        InputError: `kind` refuses the values.
    """
    values = {field.name: flag_values[field.name].value for field in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return kind(**values | lists)


def refuse_without_effect(
    options: Any,
    ignored_by: Mapping[str, Sequence[str]],
    only_with: Mapping[str, Sequence[str]],
) -> None:
    """Raise InputError for options that were given and cannot change what the command does.

    Args:
        ignored_by: for an option, the options that have no effect beside it.
        only_with: for an option, the options at least one of which it needs.
    """
    default = {field.name: field.default for field in dataclasses.fields(options)}

    def given(name: str) -> bool:
        return getattr(options, name) != default[name]

    # Why an option has no effect, and all options for which this is the reason.
    problems: dict[str, list[str]] = {}
    ignored: set[str] = set()
    for name, others in ignored_by.items():
        if given(name) and name not in ignored:
            given_others = [other for other in others if given(other)]
            ignored |= set(given_others)
            problems[f"no effect with --{name}"] = given_others
    for name, needed in only_with.items():
        if given(name) and not any(map(given, needed)):
            reason = f"no effect without {' or '.join(f'--{other}' for other in needed)}"
            problems.setdefault(reason, []).append(name)
    sentences = [
        f"{', '.join(f'--{name}' for name in names)} {'has' if len(names) == 1 else 'have'} {why}"
        for why, names in problems.items()
        if names
    ]
    if sentences:
        raise InputError("; ".join(sentences))


_DEFINE = {
    str: flags.DEFINE_string,
    str | None: flags.DEFINE_string,
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    int | None: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    float | None: flags.DEFINE_float,
    tuple[str, ...]: flags.DEFINE_multi_string,
}
