"""What both programs share: a mistake of the user ends in one sentence and exit status 2."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from pabee_jax.errors import InputError


def run(main: Callable[[Sequence[str]], None]) -> None:
    """`app.run` without stack traces for what a person can mend."""

    def guarded(arguments: Sequence[str]) -> None:
        try:
            main(arguments)
        except InputError as error:
            _stop(error)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    app.run(guarded, flags_parser=_parse)


def _parse(arguments: Sequence[str]) -> Sequence[str]:
    try:
        rest = flags.FLAGS(arguments)
    except flags.Error as error:
        _stop(error)
    except Exception as error:  # A config file that fails, or a field that it does not have.
        _stop(f"{_config_argument(arguments)}: {_reason(error)}")
    if len(rest) > 1:
        _stop(f"unexpected argument {rest[1]!r}")
    return rest


def _reason(error: Exception) -> str:
    text = str(error.args[0]) if error.args else ""
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _config_argument(arguments: Sequence[str]) -> str:
    return next((item for item in arguments[1:] if item.startswith("--config")), "--config")


def _stop(message: Any) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


__all__ = ["config_flags", "run"]
