"""Timing in turns: every measure once per round, so that a slow moment falls on all of them."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

Measure = Callable[[], Any]
# Seconds. A shorter measure is called once more, untimed, before every timed call: the threads of
# the measure before (PyTorch's OpenMP) spin for a while, and idle cores are slow to start.
_SHORT = 0.5


class Budget:
    """Wall-clock time for a whole benchmark, dealt out to its cases."""

    def __init__(self, minutes: float, cases: int):
        self._end = time.monotonic() + 60 * minutes
        self._cases = cases

    def next_case(self) -> float:
        """Seconds for the next case: an equal share of what is left."""
        left = max(0.0, self._end - time.monotonic())
        self._cases = max(0, self._cases - 1)
        return left / (self._cases + 1)


def in_turns(
    measures: Mapping[str, Measure],
    seconds: float,
    most_rounds: int = 30,
    *,
    always_twice: bool = False,
) -> dict[str, float]:
    """The median seconds of every measure.

    Each is called to warm up (which compiles), and then once per round, until the time is up
    or `most_rounds` are done; there is always at least one round. A measure must wait for its
    result. `always_twice` is for what usually follows itself: a long measure, too, is then called
    once more, untimed, before every timed call, and finds its memory as it left it.
    """
    end = time.monotonic() + seconds
    for measure in measures.values():
        measure()
    twice = {
        name for name, measure in measures.items() if always_twice or _seconds(measure) < _SHORT
    }
    taken: dict[str, list[float]] = {name: [] for name in measures}
    rounds, slowest = 0, 0.0
    while rounds == 0 or (rounds < most_rounds and time.monotonic() + slowest < end):
        started = time.monotonic()
        for name, measure in measures.items():
            if name in twice:
                measure()
            taken[name].append(_seconds(measure))
        rounds, slowest = rounds + 1, max(slowest, time.monotonic() - started)
    return {name: statistics.median(values) for name, values in taken.items()} | {"rounds": rounds}


def _seconds(measure: Measure) -> float:
    begin = time.perf_counter()
    measure()
    return time.perf_counter() - begin


def environment() -> dict[str, Any]:
    """Hardware and versions, for the JSON beside every figure."""
    import flax
    import numpy
    import transformers

    found = {
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

        found["torch"] = torch.__version__
    except ImportError:
        pass
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if "model name" in line]
        return names[0] if names else platform.processor()
    except OSError:
        return platform.processor()
