"""What each way of training the exits gives: full depth, and with 25% and 50% of layers saved.

    python -m benchmarks.training_exits --model DIR --data_dir GLUE

Every recipe trains for the same number of steps on MRPC, STS-B and 10,000 fixed rows of SST-2, and
is judged on the dev sets. Results are kept after every run in OUTPUT/training_exits.json; a second
call runs only what is missing there, and with nothing missing prints the table. `--time` measures
how long a step of each recipe takes instead, beside ordinary fine-tuning.
"""

import bisect
import collections
import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from benchmarks import command_line
from benchmarks.measure import environment, in_turns
from benchmarks.models import random_model
from benchmarks.training_step import jax_step, random_batch
from pabee_jax import EarlyExitClassifier, InputError, Patience, criteria
from pabee_jax.atomic import write_atomically
from pabee_jax.criteria import ExitCriterion, MaxProbability
from pabee_jax.data.load import load_task
from pabee_jax.evaluation.sweep import OperatingPoint, Rows, replayed
from pabee_jax.training import run_directory
from pabee_jax.training.config import TrainConfig
from pabee_jax.training.loop import train
from pabee_jax.training.strategy import phase_of

PRIOR = {"classifier_bias": "prior"}
MEAN = PRIOR | {"pooling": "mean"}
OWN_MEAN = MEAN | {"pooler": "per_exit"}
# What differs from PABEE's recipe, by name.
RECIPES: dict[str, dict[str, Any]] = {
    "ordinary": {"loss.weights": "last"},
    "pabee": {},
    "prior": PRIOR,
    "uniform": PRIOR | {"loss.weights": "uniform"},
    "two_stage": PRIOR | {"strategy": "two_stage"},
    "alternating": PRIOR | {"strategy": "alternating"},
    "last_first": PRIOR | {"strategy": "last_first"},
    "equilibrium": PRIOR | {"gradient": "equilibrium"},
    "scaled": PRIOR | {"gradient": "scaled", "gradient_scale": 0.1},
    "detached": PRIOR | {"gradient": "scaled", "gradient_scale": 0.0},
    "distill": PRIOR | {"distill.weight": 1.0},
    "per_exit": PRIOR | {"pooler": "per_exit"},
    "mean": MEAN,
    "mean+per_exit": OWN_MEAN,
    "mean+per_exit+two_stage": OWN_MEAN | {"strategy": "two_stage"},
    "mean+per_exit+equilibrium": OWN_MEAN | {"gradient": "equilibrium"},
    "mean+per_exit+scaled": OWN_MEAN | {"gradient": "scaled", "gradient_scale": 0.1},
    "mean+per_exit+alternating": OWN_MEAN | {"strategy": "alternating"},
    "mean+per_exit+distill": OWN_MEAN | {"distill.weight": 1.0},
}
# The metric that the table shows, and the tokens to which texts are cut.
METRICS = {"mrpc": "accuracy", "stsb": "pearson", "sst2": "accuracy"}
SAVINGS = (0.25, 0.5)
# A patience serves for a saving if it saves at most so much more.
_NEAR = 0.05
_SST2_ROWS = 10_000


def config_of(recipe: str, task: str, seed: int, values) -> TrainConfig:
    common = {
        "task": task,
        "model": values.model,
        "data_dir": str(values.output / "data" if task == "sst2" else values.data_dir),
        "max_seq_length": 64,
        "batch_size": 32,
        "learning_rate": values.learning_rate,
        "max_steps": values.steps,
        "eval_every": values.steps,
        "order": "length_grouped",
        "seed": seed,
    }
    fields = traverse_util.unflatten_dict(common | RECIPES[recipe], sep=".")
    return run_directory.from_dict(TrainConfig, fields)


def measured(config: TrainConfig, workdir: Path) -> dict[str, Any]:
    """Trains once; the last exit's metrics, every exit's, and those at the savings."""
    train(config, workdir, overwrite=True)
    classifier = EarlyExitClassifier.from_pretrained(str(workdir), driver="full")
    task = load_task(config)
    rows = Rows.of(task.read("dev"), classifier)
    logits = classifier.all_exit_logits(rows.dataset)

    def point_of(criterion: ExitCriterion) -> OperatingPoint:
        return replayed(logits, [criterion], task, rows)[0]

    exits = [replayed(logits[:layer], [Patience(0)], task, rows)[0] for layer in _layers(logits)]
    return {
        "exits": [dict(point.metrics) for point in exits],
        **{f"saving {share}": _told(_point_at(share, logits, point_of)) for share in SAVINGS},
    }


def _layers(logits: np.ndarray) -> range:
    return range(1, len(logits) + 1)


def _point_at(
    share: float, logits: np.ndarray, point_of: Callable[[ExitCriterion], OperatingPoint]
) -> OperatingPoint:
    """A setting that saves `share` of the layers, or a little more.

    Classification: the patience that does, else the highest confidence threshold. Scores:
    patience 1 with the smallest threshold.
    """
    if logits.shape[2] == 1:
        moved = np.abs(np.diff(logits[..., 0], axis=0)).ravel()
        candidates = [Patience(1, float(value)) for value in _spread(moved)]
    else:
        points = [point_of(Patience(patience)) for patience in range(len(logits) - 2, 0, -1)]
        for point in points:
            if share <= point.layers_saved <= share + _NEAR:
                return point
        highest = np.asarray(jax.nn.softmax(logits).max(axis=2)).ravel()
        candidates = [MaxProbability(float(value)) for value in _spread(highest)[::-1]]
    # What is saved grows along the candidates.
    first = bisect.bisect_left(
        candidates, share, key=lambda criterion: point_of(criterion).layers_saved
    )
    return point_of(candidates[min(first, len(candidates) - 1)])


def _spread(values: np.ndarray) -> np.ndarray:
    """Thresholds from the data's own quantiles."""
    return np.quantile(values, np.linspace(0, 1, 401))


def _told(point: OperatingPoint) -> dict[str, Any]:
    return {
        "criterion": criteria.to_config(point.criterion),
        "layers saved": point.layers_saved,
        **point.metrics,
    }


def step_seconds(values) -> dict[str, float]:
    """A step of each recipe, 32 rows of 48 tokens: the mean over the phases of a run."""
    measures, shares = {}, {}
    for recipe in values.recipes:
        config = config_of(recipe, "sst2", 0, values)
        model = random_model("minilm", exit_pooler=config.pooler, exit_pooling=config.pooling)
        batch, exits = random_batch(model.config, 32, 48), model.config.num_hidden_layers
        phases = [phase_of(config, step, values.steps, exits) for step in range(values.steps)]
        for phase, count in collections.Counter(phases).items():
            name = f"{recipe}, {len(measures)}"
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
    """The table: medians over the seeds, in percent."""
    records, seconds = content["records"], content.get("step seconds", {})
    header = ["recipe", "step time", "seeds"]
    header += [f"{task} {what}" for task in METRICS for what in ("full", "25%", "50%")]
    lines = []
    for recipe in RECIPES:
        cells, seeds = [], set()
        for task, metric in METRICS.items():
            here = [one for one in records if (one["recipe"], one["task"]) == (recipe, task)]
            seeds |= {one["seed"] for one in here}
            found = [[one["exits"][-1][metric] for one in here]]
            found += [[one[f"saving {share}"][metric] for one in here] for share in SAVINGS]
            cells += [f"{100 * statistics.median(each):.1f}" if each else "" for each in found]
        if seeds:
            time = ""
            if recipe in seconds:
                time = f"{seconds[recipe] / seconds['ordinary']:.2f}"
            lines.append([recipe, time, len(seeds), *cells])
    print(command_line.table(header, lines))


def main(values) -> None:
    path = values.output / "training_exits.json"
    content = {"records": []}
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
    records = content["records"]
    done = {(one["recipe"], one["task"], one["seed"]) for one in records}
    missing = [wanted for wanted in wanted_runs(values) if wanted not in done]
    if values.time:
        content["step seconds"] = step_seconds(values)
        keep(content, path, values)
        missing = []
    if missing and not (values.model and values.data_dir):
        raise InputError(
            f"{len(missing)} runs are missing in {path}: give --model and --data_dir to do them"
        )
    if any(task == "sst2" for _, task, _ in missing):
        take_rows(values.data_dir / "SST-2", values.output / "data" / "SST-2")
    for recipe, task, seed in missing:
        print(f"\n{recipe}, {task}, seed {seed}", flush=True)
        workdir = values.output / "run"
        config = config_of(recipe, task, seed, values)
        record = {"recipe": recipe, "task": task, "seed": seed, **measured(config, workdir)}
        records.append(record)
        keep(content, path, values)
        shutil.rmtree(workdir)
    show(content)


def keep(content: dict[str, Any], path: Path, values) -> None:
    content["environment"] = environment()
    content["settings"] = {"steps": values.steps, "learning_rate": values.learning_rate}
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


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
