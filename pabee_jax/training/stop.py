"""Stopping a run by SIGTERM, which job schedulers send some time before they end a job."""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """A context that records whether the run was asked to stop while the context is open.

    In a run of one process, SIGTERM asks the run to stop. In a run of several processes, JAX
    receives SIGTERM and TPU maintenance notices, and all processes agree on the step after which
    they stop.
    """

    def __enter__(self) -> "StopRequest":
        self._requested = threading.Event()
        self._is_multiprocess = jax.process_count() > 1
        # Python installs signal handlers only in the main thread.
        in_main_thread = threading.current_thread() is threading.main_thread()
        self._handles_sigterm = not self._is_multiprocess and in_main_thread
        if self._handles_sigterm:
            self._previous_handler = signal.signal(signal.SIGTERM, lambda *_: self._requested.set())
        return self

    def __exit__(self, *_) -> None:
        if self._handles_sigterm:
            signal.signal(signal.SIGTERM, self._previous_handler)

    def reached(self, step: int) -> bool:
        """Return whether the run must stop after `step`.

        Every process must call this method after every step.
        """
        if self._is_multiprocess:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._requested.is_set()
