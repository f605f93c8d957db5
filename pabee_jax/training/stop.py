"""Stopping in time: SIGTERM, which schedulers send some time before they end a job."""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Tells whether the run was asked to stop; a context that listens while it is open.

    In a run of several processes JAX listens, for TPU maintenance notices as well, and agrees with
    all processes on the step after which they stop.
    """

    def __enter__(self) -> "StopRequest":
        self._asked = threading.Event()
        self._several = jax.process_count() > 1
        self._listens = not self._several and threading.current_thread() is threading.main_thread()
        if self._listens:
            self._before = signal.signal(signal.SIGTERM, lambda *_: self._asked.set())
        return self

    def __exit__(self, *_) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, self._before)

    def reached(self, step: int) -> bool:
        """Whether to stop after `step`; every process asks after every step."""
        if self._several:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked.is_set()
