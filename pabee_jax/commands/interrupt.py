"""Ctrl-C at any moment of a command ends the process with one line and status 130."""

import _thread
import functools
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn


def import_module(name: str) -> Any:
    """Import the module of a command, which takes seconds.

    Python's own handler of Ctrl-C would raise KeyboardInterrupt in the middle of an import, which
    some libraries turn into an ImportError.
    """
    # Python installs signal handlers only in the main thread. A shell ignores SIGINT for the jobs
    # that it starts in the background.
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.getsignal(signal.SIGINT)
    if not in_main_thread or previous != signal.default_int_handler:
        return importlib.import_module(name)
    signal.signal(signal.SIGINT, end)
    try:
        return importlib.import_module(name)
    finally:
        signal.signal(signal.SIGINT, previous)


def deliver_dropped() -> None:
    """Raise every KeyboardInterrupt again that Python drops.

    Python drops the exceptions of callbacks of the garbage collector, and JAX has such a callback:
    without this function, one Ctrl-C in about ten has no effect.
    """
    sys.unraisablehook = functools.partial(deliver, sys.unraisablehook)


def deliver(previous: Callable[[Any], Any], unraisable: Any) -> None:
    """Interrupt the main thread if a KeyboardInterrupt was dropped, else call `previous`.

    This is a hook for `sys.unraisablehook`.
    """
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        # Not in this thread, where the exception would be raised in this hook and dropped again.
        _thread.start_new_thread(_interrupt_soon, ())
    else:
        previous(unraisable)


def end(*_: Any) -> NoReturn:
    """End the process with one line and status 130; a handler of SIGINT."""
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(130)


def _interrupt_soon() -> None:
    time.sleep(0.05)
    # A signal also ends a system call of the main thread, such as the wait for another process.
    if hasattr(signal, "pthread_kill"):  # Not on Windows.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        _thread.interrupt_main()
