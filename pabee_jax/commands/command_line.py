"""What the programs share: a mistake of the user ends in one sentence and exit status 2."""

import functools
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from logging import Formatter
from typing import Any, NoReturn

import jax
from absl import app, flags, logging

from pabee_jax.commands.config_file import check_field, load_config
from pabee_jax.distributed import processes
from pabee_jax.errors import InputError
from pabee_jax.io import storage
from pabee_jax.training.config import TrainConfig

# "--config", "--config=FILE", "--config.loss.weights=uniform", "--noconfig.files.regression".
_CONFIG_ARGUMENT = re.compile(r"--?(?:no)?config(?:\.(?P<field>[^=]*))?(?:=|$)")
_HELP = frozenset({"--help", "-help", "-h", "--helpfull", "--helpshort"})
# What they log with a stack they also raise.
_TELL_TWICE = re.compile(
    r"orbax.*(future|async_checkpointer|checkpoint_manager)\.py|gcsfs.*retry\.py"
)


def run(
    main: Callable[[Sequence[str]], None],
    argv: Sequence[str],
    description: str | None,
    *,
    positional: bool = False,
) -> None:
    """Call `main` through `app.run`: no stack traces for user errors, no library chatter.

    A flag named "config" must be a config file flag.

    Args:
        main: takes the program's name and the arguments that are not flags.
        argv: the program's name and all arguments.
        description: printed by `--help`, before the flags.
        positional: whether `main` takes arguments that are not flags.
    """
    if _HELP.intersection(argv[1:]):
        print(f"{(description or '').strip()}\n{_flags_help(flags.FLAGS)}")
        return

    def guarded(arguments: Sequence[str]) -> None:
        try:
            main(arguments)
        except InputError as error:
            _stop(error)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)
        except Exception as error:
            if refused := storage.refusal(error):
                _stop(f"{refused}: {getattr(error, 'filename', None) or error}")
            if not jax.distributed.is_initialized():
                raise
            traceback.print_exc()
            processes.end(1)

    # Only tokenizers of these libraries are used; they read these variables when they are imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    parser = functools.partial(_parse_quietly, positional=positional)
    app.run(guarded, argv=list(argv), flags_parser=parser)


def parse(
    arguments: Sequence[str],
    flag_values: flags.FlagValues = flags.FLAGS,
    *,
    positional: bool = False,
) -> Sequence[str]:
    """Parses the flags and returns the rest, the program's name first; exits at a mistake."""
    # The library's own parser keeps a file's error to itself until its config is used.
    if "config" in flag_values:
        flag_values["config"].parser = _ConfigParser()
    try:
        _check_config_arguments(flag_values.read_flags_from_files(arguments, force_gnu=False))
        rest = flag_values(arguments)
    except InputError as error:
        _stop(error)
    except flags.Error as error:
        # absl wraps what a parser raises.
        cause = error.__context__
        _stop(cause if isinstance(cause, InputError) else _flag_problem(error, flag_values))
    if len(rest) > 1 and not positional:
        _stop(f"unexpected argument {rest[1]!r}: every setting is written --name=value")
    return rest


def _flags_help(flag_values: flags.FlagValues) -> str:
    """The flags that a command defines, with their help; absl's own are left out."""
    modules = flag_values.flags_by_module_dict()
    names = [name for name in modules if name.startswith(("pabee_jax.", "ml_collections."))]
    return "\n".join(flag_values.module_help(name) for name in names)


class _ConfigParser(flags.ArgumentParser):
    def parse(self, argument: str) -> TrainConfig:
        return load_config(argument)


def _parse_quietly(arguments: Sequence[str], positional: bool) -> Sequence[str]:
    rest = parse(arguments, positional=positional)
    logging.get_absl_handler().setFormatter(Formatter("%(levelname)s: %(message)s"))
    # Of a full disk orbax tells two thousand lines, from each of its threads.
    logging.get_absl_handler().addFilter(
        lambda record: not (record.exc_info and _TELL_TWICE.search(record.pathname))
    )
    # absl would now choose INFO, at which orbax tells every step of a save.
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = logging.WARNING
    return rest


def _check_config_arguments(arguments: Sequence[str]) -> None:
    """Every `--config.FIELD` exists, and comes after the file that it changes."""
    has_file = False
    for argument in arguments[1:]:
        match = _CONFIG_ARGUMENT.match(argument)
        if match and match["field"] is None:
            has_file = True
        elif match:
            check_field(match["field"])
            if not has_file:
                raise InputError(f"{argument} changes a value of --config FILE: put that before it")


def _flag_problem(error: flags.Error, flag_values: flags.FlagValues) -> str:
    match = re.match(r"flag (--(\S+?)=.*?): ", str(error))
    if not match:
        return str(error)
    flag = flag_values[match[2]]
    wanted = "true or false" if flag.boolean else flag.parser.syntactic_help
    return f"{match[1]}: it must be {wanted}" if wanted else str(error)


def _stop(message: Any) -> NoReturn:
    """One line: what a library says may have several."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    processes.end(2)
