"""What all commands share: a user error ends in one sentence on stderr and exit status 2."""

import functools
import os
import re
import sys
import traceback
from collections.abc import Callable, Container, Sequence
from logging import Formatter
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from pabee_jax.commands.config_file import check_field, load_config
from pabee_jax.commands.options import define_flags
from pabee_jax.commands.plugins import run_plugins
from pabee_jax.distributed import processes
from pabee_jax.errors import InputError
from pabee_jax.io import storage
from pabee_jax.training.config import TrainConfig

# "--config", "--config=FILE", "--config.loss.weights=uniform", "--noconfig.files.regression".
_CONFIG_ARGUMENT = re.compile(r"--?(?:no)?config(?:\.(?P<field>[^=]*))?(?:=|$)")
# Modules of libraries that log an exception with its stack and raise the same exception as well.
_LOGS_WHAT_IT_RAISES = re.compile(
    r"orbax.*(future|async_checkpointer|checkpoint_manager)\.py|gcsfs.*retry\.py"
)


def define(kind: type, argv: Sequence[str], flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Define the flags of an options dataclass, and `--config` if the dataclass has `config_help`.

    If a file of `--flagfile` cannot be read, print one sentence and exit with status 2.

    Args:
        kind: the options dataclass.
        argv: the program's name and all arguments.
        flag_values: where the flags are defined.
    """
    define_flags(kind, flag_values)
    # Defining `--config` reads these files.
    try:
        flag_values.read_flags_from_files(list(argv), force_gnu=False)
    except (flags.Error, ValueError) as error:  # ValueError: a null byte, or no UTF-8.
        _stop(f"--flagfile: {str(error).removeprefix('ERROR:: ')}")
    if hasattr(kind, "config_help"):
        config_flags.DEFINE_config_file(
            "config", None, kind.config_help, flag_values=flag_values, sys_argv=list(argv)
        )


def run(
    main: Callable[[Sequence[str]], None],
    argv: Sequence[str],
    *,
    positional: bool = False,
    config_fields: Container[str] | None = None,
) -> None:
    """Call `main` through `app.run`: no stack traces for user errors, no library chatter.

    A flag named "config" must be a config file flag.

    Args:
        main: takes the program's name and the arguments that are not flags.
        argv: the program's name and all arguments.
        positional: whether `main` takes arguments that are not flags.
        config_fields: the fields of the configuration that `main` uses; absent, all. A flag for
            another field is an error, because it would have no effect.
    """

    def guarded(arguments: Sequence[str]) -> None:
        try:
            main(arguments)
        except InputError as error:
            _stop(error)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            processes.end(130)
        except Exception as error:
            if refused := storage.refusal(error):
                _stop(f"{refused}: {getattr(error, 'filename', None) or error}")
            if not jax.distributed.is_initialized():
                raise
            traceback.print_exc()
            processes.end(1)

    # The commands use only the tokenizers of these libraries, which read the variables at import.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    parser = functools.partial(_parse_quietly, positional=positional, config_fields=config_fields)
    app.run(guarded, argv=list(argv), flags_parser=parser)


def parse(
    arguments: Sequence[str],
    flag_values: flags.FlagValues = flags.FLAGS,
    *,
    positional: bool = False,
    config_fields: Container[str] | None = None,
) -> Sequence[str]:
    """Parse the flags and return the other arguments, the program's name first.

    On a user error, print one sentence and exit with status 2.
    """
    # The library's parser stores the error of a config file until the config is first used.
    if "config" in flag_values:
        flag_values["config"].parser = _ConfigParser()
    try:
        expanded = flag_values.read_flags_from_files(arguments, force_gnu=False)
        _check_config_arguments(expanded, config_fields)
        rest = flag_values(arguments)
        if "plugin" in flag_values:
            run_plugins(flag_values["plugin"].value or ())
    except InputError as error:
        _stop(error)
    except (flags.Error, ValueError) as error:  # ValueError: a value of --noFLAG.
        # absl wraps the exceptions of a parser.
        cause = error.__context__
        _stop(cause if isinstance(cause, InputError) else _describe_flag_error(error, flag_values))
    except RecursionError:  # absl compares a long unknown name with the known names.
        _stop("there is no flag of this length")
    if len(rest) > 1 and not positional:
        _stop(f"unexpected argument {rest[1]!r}: every setting is written --name=value")
    return rest


class _ConfigParser(flags.ArgumentParser):
    """Parses the value of `--config` into a checked `TrainConfig`."""

    def parse(self, argument: str) -> TrainConfig:
        return load_config(argument)


def _parse_quietly(arguments: Sequence[str], **options: Any) -> Sequence[str]:
    rest = parse(arguments, **options)
    logging.get_absl_handler().setFormatter(Formatter("%(levelname)s: %(message)s"))
    # On a full disk, each of orbax's threads logs its stack: two thousand lines in total.
    logging.get_absl_handler().addFilter(
        lambda record: not (record.exc_info and _LOGS_WHAT_IT_RAISES.search(record.pathname))
    )
    # absl's default would be INFO, at which orbax logs every step of a save.
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = logging.WARNING
    return rest


def _check_config_arguments(arguments: Sequence[str], fields: Container[str] | None) -> None:
    """Check that every `--config.FIELD` exists, is used and follows the `--config` it changes."""
    has_config = False
    for argument in arguments[1:]:
        match = _CONFIG_ARGUMENT.match(argument)
        if match and match["field"] is None:
            has_config = True
        elif match:
            check_field(match["field"])
            if not has_config:
                raise InputError(f"{argument} changes a value of --config FILE: put that before it")
            if fields is not None and match["field"] not in fields:
                raise InputError(f"{argument} has no effect: only the data are read from --config")


def _describe_flag_error(error: Exception, flag_values: flags.FlagValues) -> str:
    match = re.match(r"flag (--(\S+?)=.*?): ", str(error))
    if not match:
        return str(error)
    flag = flag_values[match[2]]
    expected = "true or false" if flag.boolean else flag.parser.syntactic_help
    return f"{match[1]}: it must be {expected}" if expected else str(error)


def _stop(message: Any) -> NoReturn:
    """Print the message in one line, also if it comes from a library in several, and exit."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    processes.end(2)
