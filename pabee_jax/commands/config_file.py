"""Loads and checks the configuration that `--config` names; each error is one sentence."""

import difflib
import inspect
import runpy
import traceback
from pathlib import Path
from typing import Any

from pabee_jax import configs
from pabee_jax.data.glue import GLUE_TASKS
from pabee_jax.errors import InputError
from pabee_jax.io import storage
from pabee_jax.training.config import TrainConfig, check_types, leaves

BUILT_IN = ("attach", "demo", "files", "glue")
USAGE = (
    "--config demo, --config files, --config attach, --config glue:TASK with TASK one of "
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
        raise InputError(f"--config {value}: {place_and_reason(error, path)}") from None
    try:
        check_types(config)
    except InputError as error:
        raise InputError(
            f"--config {value}: get_config() returns an invalid value: {error}"
        ) from None
    return config


def _path_of(name: str) -> Path:
    built_in = Path(configs.__file__).parent / f"{name}.py"
    return built_in if name in BUILT_IN else storage.local_path_of(name)


def check_field(field: str) -> None:
    """Raise InputError unless `field` ("loss.weights") is a single value of a `TrainConfig`."""
    names = list(leaves(TrainConfig()))
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


def place_and_reason(error: BaseException, path: Path) -> str:
    """Return the last line of the file `path` in the stack of the error, and the error."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"line {error.lineno}: SyntaxError: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    place = f"line {lines[-1]}: " if lines else ""
    return f"{place}{type(error).__name__}: {error}"
