"""Loads and checks the configuration that `--config` names; each error is one sentence."""

import dataclasses
import difflib
import inspect
import runpy
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pabee_jax import configs
from pabee_jax.data.glue import GLUE_TASKS
from pabee_jax.errors import InputError
from pabee_jax.training.config import TrainConfig

BUILT_IN = ("demo", "files", "glue")
USAGE = (
    "--config demo, --config files, --config glue:TASK with TASK one of "
    f"{', '.join(GLUE_TASKS)}, or --config FILE.py"
)


def load_config(value: str) -> TrainConfig:
    """Return what `get_config()` of a configuration returns.

    Args:
        value: the name of a configuration of this package ("demo") or a path that ends in ".py",
            each also with ":ARGUMENT" for `get_config(ARGUMENT)` ("glue:mrpc").

    Raises:
        InputError: there is no such configuration, it fails, or `get_config()` does not return a
            sound `TrainConfig`.
    """
    name, *argument = value.split(":", 1)
    path = _path_of(name)
    if not path.is_file():
        raise InputError(f"--config {value}: there is no file {path.absolute()}; give {USAGE}")
    try:
        config = _call(runpy.run_path(str(path)).get("get_config"), name, argument)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # The user's code may raise anything.
        raise InputError(f"--config {value}: {_place_and_reason(error, path)}") from None
    if not isinstance(config, TrainConfig):
        raise InputError(
            f"--config {value}: get_config() returns {type(config).__name__}, not a TrainConfig"
        )
    for field, problem in _problems(config):
        raise InputError(f"--config {value}: config.{field} {problem}")
    return config


def _path_of(name: str) -> Path:
    built_in = Path(configs.__file__).parent / f"{name}.py"
    return built_in if name in BUILT_IN else Path(name).expanduser()


def check_field(field: str) -> None:
    """Raise InputError unless `field` ("loss.weights") is a single value of a `TrainConfig`."""
    names = [name for name, _ in leaves(TrainConfig())]
    if field in names:
        return
    holder = field.rpartition(".")[0]
    for prefix in (f"{field}.", f"{holder}."):
        fields = [name for name in names if name.startswith(prefix)]
        if fields:
            break
    else:
        fields = names
    close = difflib.get_close_matches(field, names, n=1)
    meant = f"; did you mean {close[0]}?" if close else "."
    raise InputError(f"the config has no field {field!r}{meant} Fields: {', '.join(fields)}")


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield names and values, such as ("loss.weights", "linear"), of all fields at any depth."""
    for name, value in vars(config).items():
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _call(get_config: Any, name: str, argument: list[str]) -> Any:
    if not callable(get_config):
        raise InputError(f"--config {name}: the file has no function get_config()")
    try:
        inspect.signature(get_config).bind(*argument)
    except TypeError:
        correct = name if argument else f"{name}:ARGUMENT"
        takes = "takes no" if argument else "needs an"
        raise InputError(
            f"--config {':'.join([name, *argument])}: get_config() {takes} argument; "
            f"give --config {correct}"
        ) from None
    return get_config(*argument)


def _place_and_reason(error: BaseException, path: Path) -> str:
    """Return the last line of the configuration file in the stack of the error, and the error."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"line {error.lineno}: SyntaxError: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    place = f"line {lines[-1]}: " if lines else ""
    return f"{place}{type(error).__name__}: {error}"


def _problems(config: TrainConfig) -> Iterator[tuple[str, str]]:
    types = {name: type(value) for name, value in leaves(TrainConfig())}
    for name, value in leaves(config):
        if name not in types:
            # An assignment to a misspelled field, `config.batchsize = 8`, creates an attribute.
            yield name, "does not exist in a TrainConfig"
        elif not isinstance(value, (int, float) if types[name] is float else types[name]):
            yield name, f"is {value!r}; it must be of type {types[name].__name__}"
