"""What each way of training the exits gives: full depth, and with 25% and 50% of layers saved.

    python -m benchmarks.training_exits --model DIR --data_dir GLUE

Every recipe trains for the same number of steps on MRPC, STS-B and 10,000 fixed rows of SST-2, and
is judged on the dev sets. Every run leaves its dev logits in OUTPUT/logits; a second call does only
the runs that are missing there, and then writes OUTPUT/training_exits.json and prints the table.
`--time` measures how long a step of each recipe takes instead, beside ordinary fine-tuning.
"""

import bisect
import collections
import json
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from benchmarks import command_line
from benchmarks.measure import environment, in_turns
from benchmarks.models import random_model
from benchmarks.recipes import METRICS, RECIPES, config_of
from benchmarks.training_step import jax_step, random_batch
from pabee_jax import EarlyExitClassifier, InputError, Patience, criteria, replay
from pabee_jax.analysis import metrics
from pabee_jax.analysis.rows import Rows
from pabee_jax.criteria import ExitCriterion, MaxProbability
from pabee_jax.data import glue
from pabee_jax.data.load import load_task
from pabee_jax.io.atomic import write_atomically
from pabee_jax.training.config import TrainConfig
from pabee_jax.training.loop import train
from pabee_jax.training.strategy import phase_of

SAVINGS = (0.25, 0.5)
# A patience serves for a saving if it saves at most so much more.
_NEAR = 0.05
_SST2_ROWS = 10_000
# Beside the logits: what all the runs share.
_SETTINGS = "settings.json"


def dev_logits(config: TrainConfig, workdir: Path) -> dict[str, np.ndarray]:
    """Trains once; every exit's logits on dev, and the labels."""
    train(config, workdir, overwrite=True)
    classifier = EarlyExitClassifier.from_pretrained(str(workdir), driver="full")
    rows = Rows.of(load_task(config).read("dev"), classifier)
    assert rows.dataset.labels is not None  # Training has refused a dev set without them.
    # The library writes an array's memory as it lies, whatever its strides.
    logits = np.ascontiguousarray(classifier.all_exit_logits(rows.dataset))
    return {"logits": logits, "labels": rows.dataset.labels}


class Judge:
    """What one trained model is worth on dev, from its logits (L, N, C) and the labels (N,)."""

    def __init__(self, task: str, logits: np.ndarray, labels: np.ndarray):
        self.metrics = glue.task(task).metrics
        self.logits, self.labels = logits, labels

    def record(self) -> dict[str, Any]:
        """Every exit's metrics, and the metrics at the savings."""
        exits = [metrics.compute(self.metrics, each, self.labels) for each in self.logits]
        points = {share: self.point(self.setting_that_saves(share)) for share in SAVINGS}
        return {"exits": exits, **{f"saving {share}": point for share, point in points.items()}}

    def point(self, criterion: ExitCriterion) -> dict[str, Any]:
        exit_layers, answers = map(np.asarray, replay(criterion, self.logits))
        return {
            "criterion": criteria.to_config(criterion),
            "layers saved": 1 - float(exit_layers.mean()) / len(self.logits),
            **metrics.compute(self.metrics, answers, self.labels),
        }

    def setting_that_saves(self, share: float) -> ExitCriterion:
        """The setting that saves `share` of the layers, or as little more as it can.

        Classes: the highest patience that saves so much; if that saves more than `_NEAR` too much,
        the highest confidence threshold, if that saves less. Scores: the highest patience that can
        save so much at any threshold, with its smallest threshold.
        """
        exits = len(self.logits)
        if self.logits.shape[2] == 1:
            # Patience p leaves at layer p + 1 at the earliest.
            able = (p for p in range(exits, 0, -1) if 1 - (p + 1) / exits >= share)
            patience = next(able, 1)
            moved = np.abs(np.diff(self.logits[..., 0], axis=0))
            thresholds = [*_quantiles(moved), 2 * float(moved.max()) + 1]
            return self._first([Patience(patience, each) for each in thresholds], share)
        patience = self._first([Patience(p) for p in range(exits - 1, 0, -1)], share)
        saved = self._saved(patience)
        if share <= saved <= share + _NEAR:
            return patience
        highest = np.asarray(jax.nn.softmax(self.logits).max(axis=2))
        thresholds = [*_quantiles(highest)[::-1], 0.0]
        threshold = self._first([MaxProbability(each) for each in thresholds], share)
        return patience if share <= saved <= self._saved(threshold) else threshold

    def _first(self, settings: Sequence[ExitCriterion], share: float) -> ExitCriterion:
        """The first that saves enough; what is saved grows along the settings."""
        index = bisect.bisect_left(settings, share, key=self._saved)
        return settings[min(index, len(settings) - 1)]

    def _saved(self, criterion: ExitCriterion) -> float:
        return self.point(criterion)["layers saved"]


def _quantiles(values: np.ndarray) -> list[float]:
    """Thresholds from the data themselves, ascending."""
    return np.quantile(values, np.linspace(0, 1, 1001)).tolist()


def step_seconds(values) -> dict[str, float]:
    """A step of each recipe, 32 rows of 48 tokens: the mean over the phases of a run."""
    measures, shares = {}, {}
    for recipe in values.recipes:
        config = config_of(recipe, "sst2", 0, Path(), values)
        kind = {"exit_pooler": config.pooler, "exit_pooling": config.pooling}
        exits = random_model("minilm", **kind).config.num_hidden_layers
        phases = [phase_of(config, step, values.steps, exits) for step in range(values.steps)]
        for phase, count in collections.Counter(phases).items():
            name = f"{recipe}, {len(measures)}"
            model = random_model("minilm", **kind)  # A step takes over its parameters.
            batch = random_batch(model.config, 32, 48)
            measures[name] = jax_step(model, batch, config, phase)
            shares[name] = recipe, count / len(phases)
    taken = in_turns(measures, 60 * values.budget_minutes, most_rounds=10)
    seconds = dict.fromkeys(values.recipes, 0.0)
    for name, (recipe, share) in shares.items():
        seconds[recipe] += share * taken[name]
    return seconds


def wanted_runs(values) -> list[tuple[str, str, int]]:
    """(recipe, task, seed), all of the first seed before the second."""
    return [
        (recipe, task, seed)
        for seed in values.seeds
        for recipe in values.recipes
        for task in values.tasks
        if task != "sst2" or seed == values.seeds[0]
    ]


def show(content: dict[str, Any]) -> None:
    """The table: medians over the seeds, of which each task may have another number, in percent."""
    records, seconds = content["records"], content.get("step seconds", {})
    header = ["recipe", "step time", "seeds"]
    header += [f"{task} {what}" for task in METRICS for what in ("full", "25%", "50%")]
    lines = []
    for recipe in RECIPES:
        cells, seeds = [], []
        for task, metric in METRICS.items():
            here = [one for one in records if (one["recipe"], one["task"]) == (recipe, task)]
            seeds.append(len(here))
            found = [[one["exits"][-1][metric] for one in here]]
            found += [[one[f"saving {share}"][metric] for one in here] for share in SAVINGS]
            cells += [f"{100 * statistics.median(each):.1f}" if each else "" for each in found]
        if any(seeds):
            time = ""
            if {recipe, "ordinary"} <= seconds.keys():
                time = f"{seconds[recipe] / seconds['ordinary']:.2f}"
            lines.append([recipe, time, ", ".join(map(str, seeds)), *cells])
    print(command_line.table(header, lines))


def main(values) -> None:
    path = values.output / "training_exits.json"
    folder = values.output / "logits"
    content = _json(path)
    if values.time:
        content["step seconds"] = step_seconds(values)
    else:
        refuse_other_settings(values, folder)
        train_missing(values, folder)
        content["settings"] = _json(folder / _SETTINGS)
    content["environment"] = environment()
    content["records"] = judged(folder)
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))
    show(content)


def refuse_other_settings(values, folder: Path) -> None:
    """All runs in a folder have the model, the data and the steps in common."""
    theirs = _json(folder / _SETTINGS)
    for name, ours in _settings(values).items():
        if ours and theirs and theirs[name] != ours:
            raise InputError(
                f"--output {values.output} holds runs with --{name} {theirs[name]}, not {ours}: "
                "choose another folder"
            )


def train_missing(values, folder: Path) -> None:
    """Does the runs whose logits are not in `folder` yet."""
    missing = [run for run in wanted_runs(values) if not (folder / _file_of(*run)).is_file()]
    if missing and not (values.model and values.data_dir):
        raise InputError(
            f"{len(missing)} runs are missing in {folder}: give --model and --data_dir to do them"
        )
    if any(task == "sst2" for _, task, _ in missing):
        take_rows(values.data_dir / "SST-2", values.output / "data" / "SST-2")
    if missing:
        folder.mkdir(exist_ok=True)
        text = json.dumps(_settings(values), indent=1) + "\n"
        write_atomically(folder / _SETTINGS, lambda path: path.write_text(text))
    for recipe, task, seed in missing:
        print(f"\n{recipe}, {task}, seed {seed}", flush=True)
        workdir = values.output / "run"
        data_dir = values.output / "data" if task == "sst2" else values.data_dir
        found = dev_logits(config_of(recipe, task, seed, data_dir, values), workdir)
        write_atomically(
            folder / _file_of(recipe, task, seed),
            lambda path, found=found: path.write_bytes(safetensors.numpy.save(found)),
        )
        shutil.rmtree(workdir)


def _settings(values) -> dict[str, Any]:
    return {
        "model": values.model,
        "data_dir": str(values.data_dir or ""),
        "steps": values.steps,
        "learning_rate": values.learning_rate,
    }


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def judged(folder: Path) -> list[dict[str, Any]]:
    """A record of every run whose logits are in `folder`."""
    records = []
    for recipe in RECIPES:
        for task in METRICS:
            for path in sorted(folder.glob(_file_of(recipe, task, "*"))):
                seed = int(path.stem.rpartition("-")[2])
                record = Judge(task, **safetensors.numpy.load_file(path)).record()
                records.append({"recipe": recipe, "task": task, "seed": seed, **record})
    return records


def _file_of(recipe: str, task: str, seed: int | str) -> str:
    return f"{recipe}-{task}-{seed}.safetensors"


def take_rows(source: Path, target: Path) -> None:
    """A copy of SST-2 with `_SST2_ROWS` of its training rows, always the same ones."""
    try:
        header, *rows = (source / "train.tsv").read_text(encoding="utf-8").splitlines()
        chosen = np.random.default_rng(0).choice(len(rows), _SST2_ROWS, replace=False)
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / "dev.tsv", target)
    except OSError as error:
        raise InputError(f"--data_dir: {error.filename}: {error.strerror}") from None
    lines = [header, *(rows[index] for index in sorted(chosen))]
    (target / "train.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def arguments():
    result = command_line.parser(__doc__.splitlines()[0], models="minilm", budget_minutes=5)
    result.add_argument("--model", default="", help="the pretrained encoder: a directory or hub id")
    result.add_argument("--data_dir", type=Path, help="the folder of GLUE's folders")
    result.add_argument("--recipes", type=command_line.names_of(RECIPES), default=list(RECIPES))
    result.add_argument("--tasks", type=command_line.names_of(METRICS), default=list(METRICS))
    result.add_argument("--seeds", type=command_line.whole_numbers, default=[0, 1, 2])
    result.add_argument("--time", action="store_true", help="measure the steps' time instead")
    result.add_argument("--steps", type=command_line.positive_integer, default=240)
    result.add_argument("--learning_rate", type=float, default=1e-4)
    return result


if __name__ == "__main__":
    command_line.run(main, arguments())
