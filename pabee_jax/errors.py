"""The exceptions that end a run early (a user's mistake, a preemption), and parts of messages."""

import reprlib
from collections.abc import Callable, Sequence
from typing import Any

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 100


class InputError(ValueError):
    """The user's input is wrong.

    The message is one sentence: what is wrong, where, and what would be right. The command-line
    programs print the message without a stack trace and exit with status 2.
    """


def shown(value: Any) -> str:
    """Return the `repr` of a user's value for a message: one line of at most a few hundred letters.

    A value may be a text of many megabytes, or a list of many levels.
    """
    return " ".join(_short.repr(value).split())


def listed(names: Sequence[str], spelling: Callable[[str], str] = str, limit: int = 20) -> str:
    """Return the first names for a message, in one line."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    parts = [spelling(name) if name.isprintable() else repr(name) for name in names[:limit]]
    return ", ".join(part if len(part) <= 100 else shown(part) for part in parts) + more


def is_unicode(text: str) -> bool:
    """Return whether the text can be encoded in UTF-8.

    JSON can escape half a surrogate pair, as in "\\ud800". Tokenizers reject such a text, and it
    can be neither printed nor written to a file.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def first_line_of(error: BaseException) -> str:
    """Return the first line of an exception's message, or the name of its class if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


class Preempted(SystemExit):
    """The run received SIGTERM and saved its state; it can be resumed.

    The exit status is 143, which the shell reports for a process that SIGTERM ended. Schedulers
    therefore start the job again, and `pabee-jax train ... && pabee-jax evaluate ...` does not
    evaluate an unfinished run.
    """

    def __init__(self):
        super().__init__(143)
