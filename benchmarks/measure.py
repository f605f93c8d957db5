"""Timing of several calls in turns, so that a slow moment of the machine affects all of them."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

TimedCall = Callable[[], Any]
# Seconds. A call that is shorter runs once more, untimed, before every timed run: the threads of
# the previous call (PyTorch's OpenMP) spin for a while, and idle cores take time to speed up.
_SHORT = 0.5


class Budget:
    """Wall-clock time of a benchmark, divided among its cases."""

    def __init__(self, minutes: float, cases: int):
        self._end = time.monotonic() + 60 * minutes
        self._cases = cases

    def next_case(self) -> float:
        """Return the seconds of the next case: an equal share of the remaining time."""
        remaining = max(0.0, self._end - time.monotonic())
        self._cases = max(0, self._cases - 1)
        return remaining / (self._cases + 1)


def time_in_turns(
    timed_calls: Mapping[str, TimedCall],
    seconds: float,
    max_rounds: int = 30,
    *,
    always_twice: bool = False,
) -> dict[str, float]:
    """Return the median seconds of every call, and the number of rounds under "rounds".

    Every call runs once, untimed, which compiles it, and then once per round. Rounds end when
    `seconds` have passed or `max_rounds` are done; there is at least one round.

    Args:
        timed_calls: calls by name; a call must wait for its result.
        seconds: time for all rounds together.
        max_rounds: the largest number of rounds.
        always_twice: run long calls, too, once more, untimed, before every timed run. For a call
            that usually follows itself, such as a training step: it then finds its memory as its
            own previous run left it.
    """
    end = time.monotonic() + seconds
    for call in timed_calls.values():
        call()
    twice = {
        name for name, call in timed_calls.items() if always_twice or _seconds_of(call) < _SHORT
    }
    samples: dict[str, list[float]] = {name: [] for name in timed_calls}
    rounds, slowest_round = 0, 0.0
    while rounds == 0 or (rounds < max_rounds and time.monotonic() + slowest_round < end):
        round_start = time.monotonic()
        for name, call in timed_calls.items():
            if name in twice:
                call()
            samples[name].append(_seconds_of(call))
        rounds, slowest_round = rounds + 1, max(slowest_round, time.monotonic() - round_start)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    return medians | {"rounds": rounds}


def _seconds_of(call: TimedCall) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def environment() -> dict[str, Any]:
    """Return the date, the hardware and the versions, for the JSON file of a benchmark."""
    import flax
    import numpy
    import transformers

    properties = {
        "date": time.strftime("%Y-%m-%d"),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "platform": jax.default_backend(),
        "cpus": os.cpu_count(),
        "processor": _processor(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "numpy": numpy.__version__,
        "transformers": transformers.__version__,
    }
    try:
        import torch

        properties["torch"] = torch.__version__
    except ImportError:
        pass
    return properties


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if "model name" in line]
        return names[0] if names else platform.processor()
    except OSError:
        return platform.processor()
