"""A run's log: `metrics.jsonl` always, TensorBoard if it is installed."""

import json
import math
import pathlib
import tempfile
import time
from typing import Any

from absl import logging
from etils import epath

from pabee_jax.distributed import processes
from pabee_jax.io import storage, strict_json
from pabee_jax.io.atomic import write_atomically

METRICS_FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"
_COPY_EVERY_S = 60


class MetricsLog:
    """One JSON object per line, each with its `step`, written at once.

    A run that goes on from step n drops what the killed run had logged beyond n, so that the log
    has neither gaps nor doubles. Of several processes only the first one writes.

    In a bucket nothing can be appended to: a run there logs on this machine, and the log is copied
    to the bucket by `flush` and at least once a minute.
    """

    def __init__(self, workdir: epath.Path, step: int):
        self._file = self._tensorboard = None
        if not processes.is_first():
            return
        self._workdir = workdir
        self._here = tempfile.TemporaryDirectory() if storage.is_remote(workdir) else None
        folder = pathlib.Path(self._here.name if self._here else workdir)
        kept = [line for line in read(workdir) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        path = folder / METRICS_FILE
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard = _tensorboard_writer(folder / TENSORBOARD)
        self._copied = time.monotonic()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Logs nested dicts of numbers and lists of numbers."""
        if self._file is None:
            return
        self._file.write(strict_json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._tensorboard:
            for tag, value in _flat(values):
                self._tensorboard.add_scalar(tag, value, step)
        if self._here and time.monotonic() - self._copied > _COPY_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Returns when what was logged is in the run's folder, or a warning says that it is not."""
        if self._file is None or self._here is None:
            return
        if self._tensorboard:
            self._tensorboard.flush()
        self._copied = time.monotonic()
        try:
            storage.upload(pathlib.Path(self._here.name), self._workdir)
        except Exception as error:  # Not worth a run; and it must not hide why one ends.
            logging.warning("the log is not copied to %s: %s", self._workdir, error)

    def close(self) -> None:
        if self._file is None:
            return
        self.flush()
        self._file.close()
        if self._tensorboard:
            try:
                self._tensorboard.close()
            except OSError as error:  # Must not hide why the run ends.
                logging.warning("TensorBoard's file is incomplete: %s", error)
        if self._here:
            self._here.cleanup()


def read(workdir: epath.Path) -> list[dict[str, Any]]:
    """The complete lines of a run's log; a line that a kill cut short is left out."""
    path = workdir / METRICS_FILE
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    # What follows the last newline was being written when the run was killed.
    return [json.loads(line) for line in lines[:-1]]


def _flat(values: Any, name: str = ""):
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _flat(value, f"{name}/{key}" if name else key)
    elif isinstance(values, list):
        for index, value in enumerate(values, start=1):
            yield from _flat(value, f"{name}/exit_{index}")
    elif math.isfinite(values):
        yield name, values


def _tensorboard_writer(directory: pathlib.Path):
    try:
        from tensorboard.summary import Writer
    except ImportError:
        return None
    return Writer(str(directory))
