"""The training runs of the evidence: one per recipe, task and seed."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from flax import traverse_util

from benchmarks.recipes import RECIPES
from pabee_jax import EarlyExitClassifier, InputError
from pabee_jax.analysis.rows import Rows
from pabee_jax.data.load import load_task
from pabee_jax.io.atomic import write_atomically
from pabee_jax.training import run_directory
from pabee_jax.training.config import TrainConfig
from pabee_jax.training.run import train


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The training of a task.

    Attributes:
        folder: the name of the task's folder.
        epochs: passes over the training rows.
        first_rows: the number of training rows, from the beginning of the file; 0 means all.
    """

    folder: str
    epochs: float
    first_rows: int = 0


SCHEDULES = {
    "mrpc": Schedule("MRPC", 5),
    "stsb": Schedule("STS-B", 4),
    "sst2": Schedule("SST-2", 2, first_rows=20_000),
    "cola": Schedule("CoLA", 4),
}
# The settings of every run, unless its recipe has others.
_SHARED: dict[str, Any] = {
    "max_seq_length": 128,
    "batch_size": 32,
    "learning_rate": 3e-5,
    "warmup_steps": 40,
    "order": "length_grouped",
    "dtype": "bfloat16",
}
_SETTINGS_FILE = "settings.json"


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        recipe: a name in `RECIPES`.
        task: a name in `SCHEDULES`.
        seed: the seed.
    """

    recipe: str
    task: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.recipe}-{self.task}-{self.seed}"

    def logits_file(self, output: Path) -> Path:
        return output / "logits" / f"{self.name}.safetensors"

    def workdir(self, output: Path) -> Path:
        return output / "runs" / self.name

    def config(self, options) -> TrainConfig:
        schedule = SCHEDULES[self.task]
        data_dir = options.data_dir
        if schedule.first_rows:
            data_dir = options.output / "data"
            _copy_first_rows(options.data_dir / schedule.folder, data_dir, schedule)
        fields = _SHARED | RECIPES[self.recipe]
        fields |= {"task": self.task, "seed": self.seed, "num_epochs": float(schedule.epochs)}
        fields |= {"model": options.model, "data_dir": str(data_dir)}
        fields |= {"save_every": options.save_every}
        return run_directory.from_dict(TrainConfig, traverse_util.unflatten_dict(fields, sep="."))


def requested(options) -> list[Run]:
    """Return the requested runs, all runs of a seed before those of the next seed."""
    return [
        Run(recipe, task, seed)
        for seed in options.seeds
        for task in options.task
        for recipe in options.recipes
    ]


def recorded(output: Path) -> dict[Run, dict[str, np.ndarray]]:
    """Return the dev logits (L, N, C) and the labels (N,) of every finished run in `output`."""
    runs = {}
    for recipe in RECIPES:
        for task in SCHEDULES:
            for path in sorted((output / "logits").glob(f"{recipe}-{task}-*.safetensors")):
                run = Run(recipe, task, int(path.stem.rpartition("-")[2]))
                runs[run] = safetensors.numpy.load_file(path)
    return runs


def train_missing(options) -> None:
    """Train the requested runs without recorded logits; an interrupted run is resumed."""
    missing = [run for run in requested(options) if not run.logits_file(options.output).is_file()]
    if not missing:
        return
    if not (options.model and options.data_dir):
        raise InputError(
            f"{len(missing)} runs are missing in {options.output}: give --model and --data_dir to "
            "train them"
        )
    _check_model(options)
    for run in missing:
        print(f"\n{run.name}", flush=True)
        workdir = run.workdir(options.output)
        train(run.config(options), workdir)
        arrays = dev_logits(workdir)
        run.logits_file(options.output).parent.mkdir(exist_ok=True)
        write_atomically(
            run.logits_file(options.output),
            lambda path, arrays=arrays: path.write_bytes(safetensors.numpy.save(arrays)),
        )
        # The optimizer state of a finished run is three times as large as its parameters.
        shutil.rmtree(workdir / run_directory.CHECKPOINTS)


def dev_logits(workdir: Path) -> dict[str, np.ndarray]:
    """Return every exit's logits on the dev rows of a run, in float32, and the labels."""
    classifier = EarlyExitClassifier.from_pretrained(str(workdir), driver="full")
    rows = dev_rows(workdir, classifier)
    assert rows.dataset.labels is not None  # Training refuses a dev set without labels.
    # safetensors writes the memory of an array and ignores its strides.
    logits = np.ascontiguousarray(classifier.all_exit_logits(rows.dataset))
    return {"logits": logits, "labels": rows.dataset.labels}


def dev_rows(workdir: Path, classifier: EarlyExitClassifier) -> Rows:
    """Return the tokenized dev rows of the data that a run was trained on."""
    config = run_directory.read_config(workdir)
    return Rows.of(load_task(config).read("dev"), classifier.tokenize)


def _check_model(options) -> None:
    """Raise InputError if the runs in the output directory were trained from another model."""
    path = options.output / _SETTINGS_FILE
    settings = {"model": options.model}
    if path.is_file() and (stored := json.loads(path.read_text(encoding="utf-8"))) != settings:
        raise InputError(
            f"--output {options.output} holds runs of --model {stored['model']}: choose another "
            "directory"
        )
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(settings) + "\n"))


def _copy_first_rows(source: Path, data_dir: Path, schedule: Schedule) -> None:
    target = data_dir / schedule.folder
    try:
        lines = (source / "train.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / "dev.tsv", target)
    except OSError as error:
        raise InputError(f"--data_dir: {error.filename}: {error.strerror}") from None
    text = "".join(lines[: schedule.first_rows + 1])  # And the header.
    write_atomically(target / "train.tsv", lambda path: path.write_text(text, encoding="utf-8"))
