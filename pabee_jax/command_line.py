"""What the programs share: a mistake of the user ends in one sentence and exit status 2."""

import functools
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from logging import Formatter
from typing import Any, NoReturn

import huggingface_hub
import jax
import transformers
from absl import app, flags, logging

from pabee_jax import processes, storage
from pabee_jax.errors import InputError
from pabee_jax.training.config import TrainConfig
from pabee_jax.training.config_file import check_field, load_config

# "--config", "--config=FILE", "--config.loss.weights=uniform", "--noconfig.files.regression".
_CONFIG_ARGUMENT = re.compile(r"--?(?:no)?config(?:\.(?P<field>[^=]*))?(?:=|$)")
# What they log with a stack they also raise.
_TELL_TWICE = re.compile(
    r"orbax.*(future|async_checkpointer|checkpoint_manager)\.py|gcsfs.*retry\.py"
)


def run(main: Callable[[Sequence[str]], None], *, positional: bool = False) -> None:
    """`app.run` without stack traces for what a person can mend, and without others' chatter.

    A flag named "config" must be a config file flag. `positional`: `main` also takes arguments that
    are no flags.
    """

    def guarded(arguments: Sequence[str]) -> None:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()  # huggingface_hub's as well
        huggingface_hub.utils.logging.set_verbosity_error()
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

    app.run(guarded, flags_parser=functools.partial(_parse_quietly, positional=positional))


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
