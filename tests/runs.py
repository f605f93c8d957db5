"""Small training runs for tests: their data, their settings, and readers of their output."""

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
from pabee_jax.training import run
from pabee_jax.training.checkpoint import Checkpoints
from pabee_jax.training.config import MeshConfig, TrainConfig
from pabee_jax.training.run import train

REPOSITORY = Path(__file__).parents[1]
WORDS = ["good", "fine", "great", "fair", "bright", "poor", "bad", "dull", "weak", "bleak"]
TOTAL_STEPS = 12


class Killed(BaseException):
    """Ends a run like a signal: not an Exception, so that no handler in the program catches it."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A directory with a pretrained encoder and data files.

    The 58 training rows are 6 batches of 10 rows; there are 23 dev rows.

    The label of a row is "yes" if its words are from the first five of WORDS, else "no".
    """
    folder = tmp_path_factory.mktemp("sources")
    # A wide initialization, so that the model learns within twelve steps.
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
    """The saved parameters of a run, and the step in which the run is killed.

    Attributes:
        saved: the parameters of each checkpoint by step, copied when the checkpoint was saved.
        kill_in_step: the number, from 1, of the step in which the run is killed; None if never.
    """

    saved: dict = dataclasses.field(default_factory=dict)
    kill_in_step: int | None = None


@pytest.fixture
def recording(monkeypatch):
    recording = Recording()
    save, training_batch = Checkpoints.save, run.training_batch

    def recorded_save(self, state, score):
        recording.saved[int(state.step)] = jax.device_get(state.parameters)
        save(self, state, score)

    def batch_or_kill(*arguments, **options):
        if arguments[-1] + 1 == recording.kill_in_step:
            raise Killed
        return training_batch(*arguments, **options)

    monkeypatch.setattr(Checkpoints, "save", recorded_save)
    monkeypatch.setattr(run, "training_batch", batch_or_kill)
    return recording


def train_until_killed(config, workdir, recording, step):
    """Start a run that is killed in step `step`, counted from 1."""
    recording.kill_in_step = step
    with pytest.raises(Killed):
        train(config, workdir)
    recording.kill_in_step = None


@pytest.fixture(scope="module")
def finished(sources, tmp_path_factory):
    """The directory of a run that was neither killed nor stopped."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    train(run_config(sources), workdir)
    return workdir


def metrics_of(workdir):
    """Return the lines of the log, without the lines about speed, which differ between runs."""
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
def program(sources, tmp_path_factory):
    """A function that starts `train.py` in a process with a given run directory.

    The run saves a checkpoint every 3 steps, has dropout, and has two buckets of sequence lengths.
    """
    config = run_config(sources, max_seq_length=16, num_epochs=15, eval_every=6, save_every=3)
    path = tmp_path_factory.mktemp("config") / "config.py"
    # The configuration is the user's code, so that it can give the processes of a run the device
    # order of a TPU pod.
    path.write_text(
        "import signal, sys\n"
        "from pabee_jax.training.config import *\n"
        "if '--multihost' in sys.argv:\n"
        # A shell starts background jobs with SIGINT ignored, which their children inherit.
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"    sys.path.append({str(Path(__file__).parent)!r})\n"
        "    import device_orders\n"
        "    device_orders.permute_meshes()\n\n\n"
        f"def get_config() -> TrainConfig:\n    return {config!r}\n"
    )

    def start(workdir, *arguments, log=None, devices=None):
        command = [sys.executable, "train.py", "--config", str(path), "--workdir", str(workdir)]
        command += arguments
        environment = dict(os.environ)
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
    """Start one run in `count` processes with `devices` devices per process.

    The mesh has the device order of a TPU pod (`device_orders`).

    Args:
        program: the fixture `program`.
        workdir: the directory of the run.
        count: number of processes.
        devices: devices per process.
        *arguments: arguments of all processes.
        only: further arguments by process.
        logs: process i writes its output to LOGS.i.log; if absent, `logs` is `workdir`.
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
