"""Runs with several processes: start, end, synchronization, and exchange of values."""

import json
import os
import sys
import threading
import time
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from pabee_jax.errors import InputError, first_line_of

# With JAX's default of 100 s, a pod would stay idle that long after a process died.
_HEARTBEAT_S = 30


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout_s: int = 300,
) -> None:
    """Connect this process to the other processes of a run.

    Call this function before any other JAX function. If the other processes do not connect within
    the timeout, this process prints a message and exits with status 2.

    Without arguments, JAX detects the cluster: Cloud TPU, Slurm, Open MPI or Kubernetes. After the
    start, every process sees the devices of all processes, and every process ends if one process
    dies.

    Args:
        coordinator: HOST:PORT of process 0.
        num_processes: the number of processes.
        process_id: the index of this process, from 0.
        timeout_s: the timeout in seconds.

    Raises:
        InputError: JAX does not recognize the cluster, or only some of the arguments are given.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    absent = [name for name, value in given.items() if value is None]
    if absent and len(absent) < len(given):
        raise InputError(
            f"--{' and --'.join(absent)} is missing: give all of --coordinator, --num_processes "
            "and --process_id, or none of them on a cluster that JAX recognizes"
        )
    if not absent:
        _check(coordinator, num_processes, process_id)
    process = f"process {process_id} of {num_processes}" if not absent else "this process"
    place = f" at {coordinator}" if coordinator else ""
    timer = threading.Timer(
        timeout_s,
        _exit_after_timeout,
        [f"{process} did not connect to the other processes{place}", timeout_s],
    )
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            # JAX's timeout aborts the process without a message, so the timer must expire first.
            initialization_timeout=timeout_s + 60,
            heartbeat_timeout_seconds=_HEARTBEAT_S,
        )
    except (RuntimeError, ValueError) as error:  # XLA's errors are RuntimeErrors.
        advice = "; give --coordinator, --num_processes and --process_id" if absent else ""
        reason = first_line_of(error)
        raise InputError(
            f"--multihost: {process} cannot connect to the other processes{place}: {reason}{advice}"
        ) from error
    finally:
        timer.cancel()


def _exit_after_timeout(problem: str, timeout_s: int) -> None:
    """End a process that is blocked in `jax.distributed.initialize`."""
    print(
        f"error: --multihost: {problem} within {timeout_s} s; check that process 0 is running and "
        "reachable, that every process has a different --process_id, and that --num_processes is "
        "the same in all processes",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def end(status: int) -> NoReturn:
    """End this process after a failure.

    In a run with several processes, the process ends without JAX's shutdown. The shutdown would
    wait for the other processes, which wait for this process. JAX's heartbeat then ends the other
    processes. If process 0 ends, the other processes end immediately. Process 0 therefore waits for
    2 s, so that the other processes can report their own failures.
    """
    if not jax.distributed.is_initialized():
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
        time.sleep(2)
    os._exit(status)


def is_first() -> bool:
    """Return whether this is process 0, which prints, logs and writes unsharded files."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Block until all processes have called this function with the same `what`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def gather(value: Any) -> list[Any]:
    """Return the values of all processes, in process order.

    `value` must be serializable as JSON. Blocks until all processes have called this function.
    """
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.pad(text, (0, lengths.max() - len(text)))
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def _check(coordinator, num_processes, process_id) -> None:
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdigit()):
        raise InputError(f"--coordinator is {coordinator!r}; it must be HOST:PORT of process 0")
    if num_processes < 1 or not 0 <= process_id < num_processes:
        raise InputError(
            f"--process_id is {process_id} and --num_processes is {num_processes}; --process_id "
            "must be at least 0 and below --num_processes"
        )
