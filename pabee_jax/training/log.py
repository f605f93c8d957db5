"""The log of a run: `metrics.jsonl`, and TensorBoard if it is installed."""

import json
import math
import pathlib
import tempfile
import time
from typing import Any

from absl import logging
from etils import epath

from pabee_jax.distributed import processes
from pabee_jax.errors import InputError
from pabee_jax.io import storage, strict_json
from pabee_jax.io.atomic import write_atomically

METRICS_FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"
_COPY_EVERY_S = 60


class MetricsLog:
    """The log of a run: one JSON object per line, with its `step`.

    Every line is written immediately. In a run of several processes, only process 0 writes.

    The objects of a bucket cannot be appended to. A run in a bucket therefore logs to a local
    directory. `flush` copies the directory to the bucket, and `write` calls `flush` when the last
    copy is older than 60 s.
    """

    def __init__(self, workdir: epath.Path, step: int):
        """Open the log of the run in `workdir`, which starts or resumes at `step`.

        Lines of later steps, which a killed run wrote, are removed. The log of a resumed run
        therefore has every step once.
        """
        self._file = self._tensorboard = None
        if not processes.is_first():
            return
        self._workdir = workdir
        is_remote = storage.is_remote(workdir)
        self._local_directory = tempfile.TemporaryDirectory() if is_remote else None
        folder = pathlib.Path(self._local_directory.name if self._local_directory else workdir)
        lines = [line for line in read(workdir) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        path = folder / METRICS_FILE
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard = _tensorboard_writer(folder / TENSORBOARD)
        self._last_copy = time.monotonic()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Log `values`, nested dicts of numbers and of lists with one number per exit."""
        if self._file is None:
            return
        self._file.write(strict_json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._tensorboard:
            for tag, value in _flatten(values):
                self._tensorboard.add_scalar(tag, value, step)
        if self._local_directory and time.monotonic() - self._last_copy > _COPY_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Copy the log to the bucket of the run; log a warning if the copy fails.

        For a local run, this method does nothing.
        """
        if self._file is None or self._local_directory is None:
            return
        if self._tensorboard:
            self._tensorboard.flush()
        self._last_copy = time.monotonic()
        try:
            storage.upload(pathlib.Path(self._local_directory.name), self._workdir)
        except Exception as error:
            # A failed copy must not end the run, and must not hide the error that ends the run.
            logging.warning("the log cannot be copied to %s: %s", self._workdir, error)

    def close(self) -> None:
        """Copy the log to the bucket of the run, and close all files."""
        if self._file is None:
            return
        self.flush()
        self._file.close()
        if self._tensorboard:
            try:
                self._tensorboard.close()
            except OSError as error:  # This error must not hide the error that ends the run.
                logging.warning("the TensorBoard file is incomplete: %s", error)
        if self._local_directory:
            self._local_directory.cleanup()


def read(workdir: epath.Path) -> list[dict[str, Any]]:
    """Return the complete lines of the log in `workdir`; [] without a log.

    A line that is not a JSON object with an integer `step` is left out, with a warning: a damaged
    log must not prevent a run from being resumed.

    Raises:
        InputError: the log is not a file that can be read.
    """
    path = workdir / METRICS_FILE
    if not path.exists():
        return []
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {storage.reason_of(error)}") from None
    # Text after the last newline is a line that a killed run did not finish.
    lines = [_parse(line) for line in text.split("\n")[:-1]]
    valid_lines = [line for line in lines if line is not None]
    if len(valid_lines) < len(lines):
        count = len(lines) - len(valid_lines)
        logging.warning("%s has %d lines that are not log lines; they are removed", path, count)
    return valid_lines


def _parse(line: str) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except ValueError:
        return None
    is_log_line = isinstance(values, dict) and type(values.get("step")) is int
    return values if is_log_line else None


def _flatten(values: Any, name: str = ""):
    """Yield the tag and the value of every finite number in `values`."""
    if isinstance(values, dict):
        for child, value in values.items():
            yield from _flatten(value, f"{name}/{child}" if name else child)
    elif isinstance(values, list):
        for index, value in enumerate(values, start=1):
            yield from _flatten(value, f"{name}/exit_{index}")
    elif math.isfinite(values):
        yield name, values


def _tensorboard_writer(directory: pathlib.Path):
    try:
        from tensorboard.summary import Writer  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return Writer(str(directory))
