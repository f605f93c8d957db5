"""Timing in turns: every measure once per round, so that a slow moment falls on all of them."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

Measure = Callable[[], Any]


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
    measures: Mapping[str, Measure], seconds: float, most_rounds: int = 30
) -> dict[str, float]:
    """The median seconds of every measure.

    Each is called once to warm up (which compiles), and then once per round, until the time is up
    or `most_rounds` are done; there is always at least one round. A measure must wait for its
    result. The first round also decides how fast the machine was: no figure is taken from another
    run.
    """
    end = time.monotonic() + seconds
    for measure in measures.values():
        measure()
    taken: dict[str, list[float]] = {name: [] for name in measures}
    while True:
        started = time.monotonic()
        for name, measure in measures.items():
            begin = time.perf_counter()
            measure()
            taken[name].append(time.perf_counter() - begin)
        rounds = len(next(iter(taken.values())))
        if rounds == most_rounds or time.monotonic() + (time.monotonic() - started) > end:
            break
    return {name: statistics.median(values) for name, values in taken.items()} | {"rounds": rounds}


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
