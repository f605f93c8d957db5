"""`--plugin FILE.py`: files of the user that a command runs first, such as a criterion."""

import importlib.util
import sys
from collections.abc import Sequence

from pabee_jax.commands.config_file import place_and_reason
from pabee_jax.commands.options import option
from pabee_jax.errors import InputError
from pabee_jax.io import storage


def plugin_option():
    """Declare the option; `command_line.parse` runs the files before it checks other options."""
    return option(
        "Python file to run first, such as one that registers an exit criterion; may be given "
        "several times.",
        (),
    )


def run_plugins(names: Sequence[str]) -> None:
    """Import every file as a module of its own.

    Raises:
        InputError: there is no such file, or the file raises an exception.
    """
    for name in names:
        path = storage.local_path_of(name)
        if not path.is_file() or path.suffix != ".py":
            raise InputError(f"--plugin {name}: it must be a Python file, FILE.py")
        # A prefix, so that a file `json.py` does not replace a module that others import.
        spec = importlib.util.spec_from_file_location(f"pabee_jax_plugin_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)  # pyright: ignore[reportArgumentType]
        sys.modules[module.__name__] = module  # For pickle.
        try:
            spec.loader.exec_module(module)  # pyright: ignore[reportOptionalMemberAccess]
        except (Exception, SystemExit) as error:  # The user's code may raise anything.
            raise InputError(f"--plugin {name}: {place_and_reason(error, path)}") from None
