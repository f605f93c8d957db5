"""The text of `--help`: the options of a command, and the fields of its `--config`."""

import inspect
import re
import typing
from typing import Any

from absl import flags

from pabee_jax.commands.options import define_flags
from pabee_jax.training.config import TrainConfig, leaves

_HEADINGS = ("Options:", "Fields of the configuration, with the defaults of TrainConfig:")
# A line of a docstring's "Attributes:", and the more indented lines that continue it.
_ATTRIBUTE = re.compile(r"^ {4}(\w[\w, ]*): (.*(?:\n {5,}.*)*)", re.MULTILINE)


def help_text(kind: type) -> str:
    """Return the options of the dataclass `kind`, each with its default, type and description."""
    options = flags.FlagValues()
    define_flags(kind, options)
    if not hasattr(kind, "config_help"):
        return _flags_help(options)
    flags.DEFINE_string("config", None, kind.config_help, flag_values=options)
    fields = flags.FlagValues()
    descriptions, defaults = _descriptions(TrainConfig), leaves(TrainConfig())
    for name in kind.config_fields:
        default = defaults[name]
        define = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float}
        define_field = define.get(type(default), flags.DEFINE_string)
        define_field(f"config.{name}", default, descriptions.get(name, ""), flag_values=fields)
    parts = zip(_HEADINGS, (options, fields), strict=True)
    return "\n\n".join(f"{heading}\n{_flags_help(values)}" for heading, values in parts)


def _flags_help(flag_values: flags.FlagValues) -> str:
    # The first line of a module's help is the module's name.
    modules = flag_values.flags_by_module_dict()
    return "\n".join(flag_values.module_help(name).lstrip().partition("\n")[2] for name in modules)


def _descriptions(config_class: type, prefix: str = "") -> dict[str, str]:
    """Return the description of every field at any depth, from "Attributes:" in the docstrings."""
    descriptions = {}
    for parent in reversed(config_class.__mro__):
        for names, text in _ATTRIBUTE.findall(inspect.getdoc(parent) or ""):
            if not text.startswith("see `"):
                description = " ".join(text.split())
                descriptions |= {prefix + name: description for name in names.split(", ")}
    types: dict[str, Any] = typing.get_type_hints(config_class)
    for name, kind in types.items():
        if kind.__module__.startswith("pabee_jax."):
            descriptions |= _descriptions(kind, f"{prefix}{name}.")
    return descriptions
