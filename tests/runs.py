"""Small training runs for tests: their data, their settings, and what they leave behind."""

import csv
import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from helpers import tiny_checkpoint
from pabee_jax.data.config import FilesConfig
from pabee_jax.training import loop
from pabee_jax.training.checkpoint import Checkpoints
from pabee_jax.training.config import MeshConfig, TrainConfig
from pabee_jax.training.loop import train

REPOSITORY = Path(__file__).parents[1]
WORDS = ["good", "fine", "great", "fair", "bright", "poor", "bad", "dull", "weak", "bleak"]
TOTAL_STEPS = 12


class Killed(BaseException):
    """Not an Exception: like a signal, nothing in the program may catch it."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A pretrained encoder and data files, 6 batches of 10: the first five words say "yes"."""
    folder = tmp_path_factory.mktemp("sources")
    # A wide initialisation, so that twelve steps suffice to learn something.
    tiny_checkpoint(folder / "model", WORDS, initializer_range=0.3)
    random = np.random.default_rng(0)
    for name, rows in (("train", 58), ("dev", 23)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for row in range(rows):
                label = row % 2
                words = random.choice(WORDS[:5] if label else WORDS[5:], random.integers(1, 6))
                writer.writerow([" ".join(words), ["no", "yes"][label]])
    return folder


def run_config(sources, **overrides):
    values = {
        "task": "files",
        "model": str(sources / "model"),
        "data_dir": str(sources),
        "files": FilesConfig(train="train.csv", dev="dev.csv"),
        "max_seq_length": 8,
        "batch_size": 10,
        "learning_rate": 3e-3,
        "num_epochs": 2,
        "eval_every": 4,
        "save_every": 2,
        "seed": 4,
        "mesh": MeshConfig(data=1),
    }
    return TrainConfig(**values | overrides)


@dataclasses.dataclass
class Recording:
    """What happens in a run, seen from outside.

    Attributes:
        saved: the parameters in each checkpoint by step, copied when they were saved.
        kill_in_step: the number of the step in which the run dies.
    """

    saved: dict = dataclasses.field(default_factory=dict)
    kill_in_step: int | None = None


@pytest.fixture
def recording(monkeypatch):
    recording = Recording()
    save, training_batch = Checkpoints.save, loop.training_batch

    def recorded_save(self, state, score):
        recording.saved[int(state.step)] = jax.device_get(state.parameters)
        save(self, state, score)

    def deadly_batch(*arguments, **options):
        if arguments[-1] + 1 == recording.kill_in_step:
            raise Killed
        return training_batch(*arguments, **options)

    monkeypatch.setattr(Checkpoints, "save", recorded_save)
    monkeypatch.setattr(loop, "training_batch", deadly_batch)
    return recording


@pytest.fixture(scope="module")
def finished(sources, tmp_path_factory):
    """A run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    train(run_config(sources), workdir)
    return workdir


def metrics_of(workdir):
    """The log, without the lines about speed, which are never the same."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "speed" not in line]


def weights_of(workdir):
    return (workdir / "model.safetensors").read_bytes()


def kept_steps(workdir):
    names = (path.name for path in (workdir / "checkpoints").iterdir())
    return sorted(int(name) for name in names if not name.startswith("damaged-"))


def contents(workdir):
    return {
        str(path.relative_to(workdir)): path.read_bytes()
        for path in workdir.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def program(sources, compilation_cache, tmp_path_factory):
    """Starts `train.py` in a directory; the run saves often, has dropout, and two buckets."""
    config = run_config(sources, max_seq_length=16, num_epochs=15, eval_every=6, save_every=3)
    path = tmp_path_factory.mktemp("config") / "config.py"
    path.write_text(
        "from pabee_jax.training.config import *\n\n\n"
        f"def get_config() -> TrainConfig:\n    return {config!r}\n"
    )
    base = {**os.environ, "JAX_COMPILATION_CACHE_DIR": compilation_cache}
    base["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

    def start(workdir, *arguments, log=None, devices=None):
        command = [sys.executable, "train.py", "--config", str(path), "--workdir", str(workdir)]
        command += arguments
        environment = dict(base)
        if devices:
            environment["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices}"
        with (log or workdir.with_suffix(".log")).open("a") as output:
            return subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stdout=output, stderr=subprocess.STDOUT
            )

    return start


@pytest.fixture(scope="module")
def undisturbed(program, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert program(workdir).wait() == 0, workdir.with_suffix(".log").read_text()
    return workdir


def steps_logged(workdir):
    try:
        return sum('"loss"' in line for line in (workdir / "metrics.jsonl").open())
    except FileNotFoundError:
        return 0


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start_all(program, workdir, count, devices, *arguments, only=None, logs=None):
    """`count` processes with `devices` each.

    `only`: more arguments by process. Process i writes its output to LOGS.i.log; absent, `logs` is
    the workdir.
    """
    together = ["--multihost", f"--coordinator=localhost:{free_port()}", f"--num_processes={count}"]
    return [
        program(
            workdir,
            *together,
            f"--process_id={index}",
            "--config.mesh.data=-1",
            *arguments,
            *(only or {}).get(index, ()),
            log=(logs or workdir).with_suffix(f".{index}.log"),
            devices=devices,
        )
        for index in range(count)
    ]


def outputs(workdir):
    return "\n".join(path.read_text() for path in sorted(workdir.parent.glob("*.log")))
