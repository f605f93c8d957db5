"""A run's log: `metrics.jsonl` always, TensorBoard if it is installed."""

import json
import math
from pathlib import Path
from typing import Any

from pabee_jax import processes
from pabee_jax.atomic import write_atomically
from pabee_jax.evaluation.metrics import nan_to_null


class MetricsLog:
    """One JSON object per line, each with its `step`, written at once.

    A run that goes on from step n drops what the killed run had logged beyond n, so that the log
    has neither gaps nor doubles. Of several processes only the first one writes.
    """

    def __init__(self, path: Path, tensorboard: Path, step: int):
        self._file = self._tensorboard = None
        if not processes.is_first():
            return
        _cut_back(path, step)
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard = _tensorboard_writer(tensorboard)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Logs nested dicts of numbers and lists of numbers."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **nan_to_null(values)}) + "\n")
        self._file.flush()
        if self._tensorboard:
            for tag, value in _flat(values):
                self._tensorboard.add_scalar(tag, value, step)

    def close(self) -> None:
        if self._file:
            self._file.close()
        if self._tensorboard:
            self._tensorboard.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a log; a line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    # What follows the last newline was being written when the run was killed.
    return [json.loads(line) for line in lines[:-1]]


def _cut_back(path: Path, step: int) -> None:
    kept = [line for line in read(path) if line["step"] <= step]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _flat(values: Any, name: str = ""):
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _flat(value, f"{name}/{key}" if name else key)
    elif isinstance(values, list):
        for index, value in enumerate(values, start=1):
            yield from _flat(value, f"{name}/exit_{index}")
    elif math.isfinite(values):
        yield name, values


def _tensorboard_writer(directory: Path):
    try:
        from tensorboard.summary import Writer
    except ImportError:
        return None
    return Writer(str(directory))
