"""A run of several processes: how they meet, and what only the first of them does."""

import json
import os
import sys
import threading
import time
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from pabee_jax.errors import InputError

# JAX's default of 100 s would leave a pod idle for long after one process died.
_HEARTBEAT_S = 30


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout_s: int = 300,
) -> None:
    """Joins the processes of a run; must come before anything else of JAX.

    When the others do not come in time, the process ends with a message and status 2.

    Without arguments JAX finds the others itself: on Cloud TPU, under Slurm, Open MPI or
    Kubernetes. Every process then sees the devices of all, and every process ends when one dies.

    Args:
        coordinator: HOST:PORT of process 0.
        num_processes: how many there are.
        process_id: which one this is, from 0.
        timeout_s: how long to wait for the others.

    Raises:
        InputError: JAX does not know this cluster, or the arguments are incomplete.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    absent = [name for name, value in given.items() if value is None]
    if absent and len(absent) < len(given):
        raise InputError(
            f"--{' and --'.join(absent)} is missing: give all of --coordinator, --num_processes "
            "and --process_id, or none of them where JAX knows the cluster"
        )
    if not absent:
        _check(coordinator, num_processes, process_id)
    who = f"process {process_id} of {num_processes}" if not absent else "this process"
    where = f" at {coordinator}" if coordinator else ""
    patience = threading.Timer(
        timeout_s, _give_up, [f"{who} did not meet the others{where}", timeout_s]
    )
    patience.daemon = True
    patience.start()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=timeout_s + 60,  # It ends in an abort; ours comes first.
            heartbeat_timeout_seconds=_HEARTBEAT_S,
        )
    except (RuntimeError, ValueError) as error:  # XLA's errors are RuntimeErrors.
        advice = "; give --coordinator, --num_processes and --process_id" if absent else ""
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"--multihost: {who} cannot join the others{where}: {reason}{advice}"
        ) from error
    finally:
        patience.cancel()


def _give_up(what: str, timeout_s: int) -> None:
    """Ends a process that hangs in JAX's start."""
    print(
        f"error: --multihost: {what} within {timeout_s} s: is process 0 running there, reachable, "
        "and was each started with its own --process_id and the same --num_processes?",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def end(status: int) -> NoReturn:
    """Ends this process after a failure.

    In a run of several at once: the usual end would wait for the others, which wait for this one.
    They notice by JAX's heartbeat. The first process, whose end the others notice immediately, lets
    them tell their own failure first.
    """
    if not jax.distributed.is_initialized():
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
        time.sleep(2)
    os._exit(status)


def is_first() -> bool:
    """Whether this is the process that prints, logs and writes what is not sharded."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Returns when every process has come to the same point."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def gathered(value: Any) -> list[Any]:
    """What every process gives, by process; `value` is anything that JSON can say.

    Waits for all of them.
    """
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.pad(text, (0, lengths.max() - len(text)))
    every = multihost_utils.process_allgather(padded)
    return [json.loads(row[:length].tobytes()) for row, length in zip(every, lengths, strict=True)]


def _check(coordinator, num_processes, process_id) -> None:
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdigit()):
        raise InputError(f"--coordinator is {coordinator!r}; it must be HOST:PORT of process 0")
    if num_processes < 1 or not 0 <= process_id < num_processes:
        raise InputError(
            f"--process_id is {process_id} and --num_processes {num_processes}; the first must be "
            "from 0 to below the second"
        )
