"""Dev metrics of every training recipe at full depth and with 25% and 50% of the layers saved.

    python -m benchmarks.training_exits --model DIR --data_dir GLUE
    python -m benchmarks.training_exits --time

Every recipe trains for the same number of steps on MRPC, STS-B and 10,000 fixed rows of SST-2, and
is evaluated on the dev sets. A run stores its dev logits in OUTPUT/logits. When the command is
given again, it trains only the runs whose logits are missing. It then writes
OUTPUT/training_exits.json and prints the table. With --time, it measures the time of a training
step of every recipe, relative to ordinary fine-tuning, and trains nothing.
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
from benchmarks.evidence.runs import dev_logits
from benchmarks.measure import environment, time_in_turns
from benchmarks.models import random_model
from benchmarks.recipes import METRICS, RECIPES, config_of
from benchmarks.training_step import make_jax_step, random_batch
from pabee_jax import InputError, Patience, criteria, replay
from pabee_jax.analysis import metrics
from pabee_jax.criteria import ExitCriterion, MaxProbability
from pabee_jax.data import glue
from pabee_jax.io.atomic import write_atomically
from pabee_jax.training.run import train
from pabee_jax.training.strategy import phase_of

SAVINGS = (0.25, 0.5)
# Patience is chosen for a saving if it saves at most this share of the layers more.
_TOLERANCE = 0.05
_SST2_ROWS = 10_000
# The settings that all runs in the directory of the logits share.
_SETTINGS_FILE = "settings.json"


class DevEvaluation:
    """The evaluation of one trained model on dev, from its logits (L, N, C) and the labels (N,)."""

    def __init__(self, task: str, logits: np.ndarray, labels: np.ndarray):
        self.metrics = glue.task(task).metrics
        self.logits, self.labels = logits, labels

    def record(self) -> dict[str, Any]:
        """Return every exit's metrics, and the operating points at the shares of `SAVINGS`."""
        exits = [
            metrics.compute(self.metrics, exit_logits, self.labels) for exit_logits in self.logits
        ]
        points = {share: self.operating_point(self.setting_that_saves(share)) for share in SAVINGS}
        return {"exits": exits, **{f"saving {share}": point for share, point in points.items()}}

    def operating_point(self, criterion: ExitCriterion) -> dict[str, Any]:
        """Return the saved share of the layers and the metrics under `criterion`."""
        exit_layers, answers = map(np.asarray, replay(criterion, self.logits))
        return {
            "criterion": criteria.to_config(criterion),
            "layers saved": 1 - float(exit_layers.mean()) / len(self.logits),
            **metrics.compute(self.metrics, answers, self.labels),
        }

    def setting_that_saves(self, share: float) -> ExitCriterion:
        """Return the setting that saves at least `share` of the layers, and little more.

        For classes, it is the highest patience that saves `share`. If that patience saves more than
        `share` + `_TOLERANCE`, it is the highest confidence threshold that saves `share`, provided
        that this threshold saves less than the patience. For scores, it is the highest patience
        that can save `share` with any threshold, with the smallest threshold that does.
        """
        exits = len(self.logits)
        if self.logits.shape[2] == 1:
            # With patience p, a row exits at layer p + 1 at the earliest.
            sufficient = (p for p in range(exits, 0, -1) if 1 - (p + 1) / exits >= share)
            patience = next(sufficient, 1)
            differences = np.abs(np.diff(self.logits[..., 0], axis=0))
            thresholds = [*_quantiles(differences), 2 * float(differences.max()) + 1]
            settings = [Patience(patience, threshold) for threshold in thresholds]
            return self._first_that_saves(share, settings)
        patience = self._first_that_saves(share, [Patience(p) for p in range(exits - 1, 0, -1)])
        saved = self._saved(patience)
        if share <= saved <= share + _TOLERANCE:
            return patience
        max_probabilities = np.asarray(jax.nn.softmax(self.logits).max(axis=2))
        thresholds = [*_quantiles(max_probabilities)[::-1], 0.0]
        confidence = self._first_that_saves(share, [MaxProbability(t) for t in thresholds])
        return patience if share <= saved <= self._saved(confidence) else confidence

    def _first_that_saves(self, share: float, settings: Sequence[ExitCriterion]) -> ExitCriterion:
        """Return the first setting that saves `share`; later settings save at least as much."""
        index = bisect.bisect_left(settings, share, key=self._saved)
        return settings[min(index, len(settings) - 1)]

    def _saved(self, criterion: ExitCriterion) -> float:
        return self.operating_point(criterion)["layers saved"]


def _quantiles(values: np.ndarray) -> list[float]:
    """Return 1001 quantiles of the values, ascending, as thresholds."""
    return np.quantile(values, np.linspace(0, 1, 1001)).tolist()


def step_seconds(options) -> dict[str, float]:
    """Return the seconds of a training step of 32 rows of 48 tokens, by recipe.

    The steps of a recipe with several phases are averaged over a run.
    """
    timed_calls, shares = {}, {}
    for recipe in options.recipes:
        config = config_of(recipe, "sst2", 0, Path(), options)
        exit_kind = {"exit_pooler": config.pooler, "exit_pooling": config.pooling}
        exits = random_model("minilm", **exit_kind).config.num_hidden_layers
        phases = [phase_of(config, step, options.steps, exits) for step in range(options.steps)]
        for phase, count in collections.Counter(phases).items():
            name = f"{recipe}, {len(timed_calls)}"
            # A step donates its parameters.
            model = random_model("minilm", options.dtype, **exit_kind)
            batch = random_batch(model.config, 32, 48)
            timed_calls[name] = make_jax_step(model, batch, config, phase)
            shares[name] = recipe, count / len(phases)
    medians = time_in_turns(timed_calls, 60 * options.budget_minutes, max_rounds=10)
    seconds = dict.fromkeys(options.recipes, 0.0)
    for name, (recipe, share) in shares.items():
        seconds[recipe] += share * medians[name]
    return seconds


def requested_runs(options) -> list[tuple[str, str, int]]:
    """Return (recipe, task, seed) of every run, all runs of a seed before those of the next seed.

    SST-2 runs with the first seed only.
    """
    return [
        (recipe, task, seed)
        for seed in options.seeds
        for recipe in options.recipes
        for task in options.task
        if task != "sst2" or seed == options.seeds[0]
    ]


def print_table(content: dict[str, Any]) -> None:
    """Print medians over the seeds, in percent, and the number of seeds of every task."""
    records, seconds = content["records"], content.get("step seconds", {})
    header = ["recipe", "step time", "seeds"]
    header += [f"{task} {depth}" for task in METRICS for depth in ("full", "25%", "50%")]
    lines = []
    for recipe in RECIPES:
        cells, seeds = [], []
        for task, metric in METRICS.items():
            runs = [run for run in records if (run["recipe"], run["task"]) == (recipe, task)]
            seeds.append(len(runs))
            columns = [[run["exits"][-1][metric] for run in runs]]
            columns += [[run[f"saving {share}"][metric] for run in runs] for share in SAVINGS]
            cells += [
                f"{100 * statistics.median(column):.1f}" if column else "" for column in columns
            ]
        if any(seeds):
            relative_time = ""
            if {recipe, "ordinary"} <= seconds.keys():
                relative_time = f"{seconds[recipe] / seconds['ordinary']:.2f}"
            lines.append([recipe, relative_time, ", ".join(map(str, seeds)), *cells])
    print(command_line.table(header, lines))


def main(options) -> None:
    path = options.output / "training_exits.json"
    folder = options.output / "logits"
    content = _read_json(path)
    if options.time:
        names = ("model", "data_dir", "task", "seeds")
        command_line.refuse_without_effect(options, make_parser(), names, "with --time")
        content["step seconds"] = step_seconds(options)
    else:
        names = ("budget_minutes",)
        command_line.refuse_without_effect(options, make_parser(), names, "without --time")
        refuse_other_settings(options, folder)
        train_missing(options, folder)
        content["settings"] = _read_json(folder / _SETTINGS_FILE)
    content["environment"] = environment()
    content["records"] = records_of(folder)
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))
    print_table(content)


def refuse_other_settings(options, folder: Path) -> None:
    """Raise InputError if the runs in `folder` have another model, other data or other steps."""
    stored = _read_json(folder / _SETTINGS_FILE)
    for name, value in _settings(options).items():
        if value and stored and stored[name] != value:
            raise InputError(
                f"--output {options.output} holds runs with --{name} {stored[name]}, not {value}: "
                "choose another directory"
            )


def train_missing(options, folder: Path) -> None:
    """Train the requested runs whose logits are not in `folder`."""
    missing = [run for run in requested_runs(options) if not (folder / _file_name(*run)).is_file()]
    if missing and not (options.model and options.data_dir):
        raise InputError(
            f"{len(missing)} runs are missing in {folder}: give --model and --data_dir to train "
            "them"
        )
    if any(task == "sst2" for _, task, _ in missing):
        copy_sst2_rows(options.data_dir / "SST-2", options.output / "data" / "SST-2")
    if missing:
        folder.mkdir(exist_ok=True)
        text = json.dumps(_settings(options), indent=1) + "\n"
        write_atomically(folder / _SETTINGS_FILE, lambda path: path.write_text(text))
    for recipe, task, seed in missing:
        print(f"\n{recipe}, {task}, seed {seed}", flush=True)
        workdir = options.output / "run"
        data_dir = options.output / "data" if task == "sst2" else options.data_dir
        train(config_of(recipe, task, seed, data_dir, options), workdir, overwrite=True)
        arrays = dev_logits(workdir)
        write_atomically(
            folder / _file_name(recipe, task, seed),
            lambda path, arrays=arrays: path.write_bytes(safetensors.numpy.save(arrays)),
        )
        shutil.rmtree(workdir)


def _settings(options) -> dict[str, Any]:
    return {
        "model": options.model,
        "data_dir": str(options.data_dir or ""),
        "steps": options.steps,
        "learning_rate": options.learning_rate,
        "dtype": options.dtype,
    }


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def records_of(folder: Path) -> list[dict[str, Any]]:
    """Return a record of every run whose logits are in `folder`."""
    records = []
    for recipe in RECIPES:
        for task in METRICS:
            for path in sorted(folder.glob(_file_name(recipe, task, "*"))):
                seed = int(path.stem.rpartition("-")[2])
                record = DevEvaluation(task, **safetensors.numpy.load_file(path)).record()
                records.append({"recipe": recipe, "task": task, "seed": seed, **record})
    return records


def _file_name(recipe: str, task: str, seed: int | str) -> str:
    return f"{recipe}-{task}-{seed}.safetensors"


def copy_sst2_rows(source: Path, target: Path) -> None:
    """Copy SST-2 with `_SST2_ROWS` of its training rows, the same rows in every call."""
    try:
        header, *rows = (source / "train.tsv").read_text(encoding="utf-8").splitlines()
        chosen = np.random.default_rng(0).choice(len(rows), _SST2_ROWS, replace=False)
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / "dev.tsv", target)
    except OSError as error:
        raise InputError(f"--data_dir: {error.filename}: {error.strerror}") from None
    lines = [header, *(rows[index] for index in sorted(chosen))]
    (target / "train.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_parser():
    parser = command_line.base_parser(__doc__)
    command_line.add_pretrained_model(parser)
    command_line.add_dtype(parser)
    command_line.add_compilation_cache(parser)
    command_line.add_budget(parser, 5)
    parser.add_argument("--recipes", type=command_line.names_of(RECIPES), default=list(RECIPES))
    parser.add_argument(
        "--task",
        type=command_line.names_of(METRICS),
        default=list(METRICS),
        help=f"tasks, comma-separated: {', '.join(METRICS)}",
    )
    parser.add_argument("--seeds", type=command_line.whole_numbers, default=[0, 1, 2])
    parser.add_argument(
        "--time", action="store_true", help="measure the time of a training step, and do not train"
    )
    parser.add_argument("--steps", type=command_line.positive_integer, default=240)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    return parser


if __name__ == "__main__":
    command_line.run(main, make_parser())
