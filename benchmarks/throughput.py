"""Many rows: examples per second of every driver against the mean exit layer.

    python -m benchmarks.throughput
    python -m benchmarks.throughput --checkpoint runs/mrpc --patience 0,3,4,5

Without a checkpoint: models with random weights, rows of one length, exit layers from a binomial
distribution around the given means. With one: its own dev set and real exits, and the factors by
which it differs from PyTorch with length-sorted batches.
"""

import argparse
import functools

import jax
import matplotlib
import numpy as np

from benchmarks import command_line, pytorch
from benchmarks.checkpoint import dev_set
from benchmarks.exit_schedule import ExitSchedule, binomial_exit_layers
from benchmarks.figures import bars
from benchmarks.measure import Budget, in_turns
from benchmarks.models import random_model, random_tokens
from pabee_jax import EarlyExitClassifier, Patience
from pabee_jax.checkpoints.pretrained import Pretrained
from pabee_jax.data.batching import MODEL_INPUTS, by_bucket, inference_buckets
from pabee_jax.models.flops import per_token_and_layer

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PYTORCH_BATCH = 32
FULL_DEPTH = "full depth"


def classifiers_of(model, length: int, drivers, chunk_tokens) -> dict[str, EarlyExitClassifier]:
    """A classifier per driver, without a tokenizer: it gets token ids."""
    pretrained = Pretrained(model, None, {}, ("0", "1"), length)
    return {
        driver: EarlyExitClassifier(pretrained, driver=driver, chunk_tokens=chunk_tokens)
        for driver in drivers
    }


def random_case(name: str, rows: int, values, seconds: float) -> list[dict]:
    model = random_model(name, values.dtype)
    config, length = model.config, values.sequence_length
    tokens = random_tokens(config, rows, length)
    schedules = {FULL_DEPTH: np.full(rows, config.num_hidden_layers, np.int32)}
    for mean in values.means:
        share = mean * config.num_hidden_layers / 12
        schedules[mean] = binomial_exit_layers(rows, share, config.num_hidden_layers)
    measures = {}
    for driver, classifier in classifiers_of(
        model, length, values.drivers, values.chunk_tokens
    ).items():

        def run(exit_layers, classifier=classifier, driver=driver):
            if driver == "full":  # Every row goes all the way: the exits change nothing.
                return classifier.all_exit_logits(tokens)
            classifier.criterion = ExitSchedule(exit_layers)
            found = classifier.predict(tokens)
            np.testing.assert_array_equal(found.exit_layers, exit_layers)

        for mean, exit_layers in schedules.items():
            if driver != "full" or mean == FULL_DEPTH:
                measures[driver, mean] = functools.partial(run, exit_layers)
    if values.torch:
        last_exit = pytorch.last_exit(model, values.dtype)
        lengths = np.full(rows, length)
        measures["PyTorch", FULL_DEPTH] = lambda: [
            last_exit(batch) for batch in pytorch.length_sorted(lengths, tokens, PYTORCH_BATCH)
        ]
    taken = in_turns(measures, seconds, values.rounds)
    rounds = taken.pop("rounds")
    return records_of(name, rows, length, config, schedules, taken, rounds)


def records_of(name, rows, length, config, schedules, taken, rounds) -> list[dict]:
    depth = config.num_hidden_layers
    ours = [taken[key] for key in taken if key[1] == FULL_DEPTH and key[0] != "PyTorch"]
    found = []
    for (driver, mean), seconds in taken.items():
        real_mean = float(schedules[mean].mean())
        share = real_mean / depth
        flops = rows * length * depth * per_token_and_layer(config, length)
        found.append(
            {
                "model": name,
                "rows": rows,
                "driver": driver,
                "mean exit layer": real_mean,
                "examples/s": rows / seconds,
                "ms/example": 1000 * seconds / rows,
                "speed-up": taken[driver, FULL_DEPTH] / seconds,
                "efficiency": taken[driver, FULL_DEPTH] / seconds * share,
                "efficiency over the fastest": min(ours) / seconds * share,
                "GFLOP/s": flops / seconds / 1e9 if mean == FULL_DEPTH else None,
                "rounds": rounds,
            }
        )
    return found


def checkpoint_case(values) -> list[dict]:
    """A trained checkpoint's dev set, and PyTorch on the same rows."""
    pretrained, dataset = dev_set(values.checkpoint, values.dtype)
    rows, layers = len(dataset), pretrained.model.config.num_hidden_layers
    full = EarlyExitClassifier(pretrained, driver="full")
    pool = EarlyExitClassifier(pretrained, driver="pool", chunk_tokens=values.chunk_tokens)
    mean_of = {}

    def run(patience):
        pool.criterion = Patience(patience, values.regression_threshold)
        mean_of[f"pool, patience {patience}"] = float(pool.predict(dataset).exit_layers.mean())

    measures = {f"pool, patience {each}": functools.partial(run, each) for each in values.patience}
    measures["full, batches of 32"] = lambda: full.all_exit_logits(dataset)
    if values.torch:
        last_exit = pytorch.last_exit(pretrained.model, values.dtype)
        buckets = inference_buckets(pretrained.max_length)
        wide = dataset.fitted(pretrained.max_length)
        whole = {name: getattr(wide, name) for name in MODEL_INPUTS}
        ways = {
            f"PyTorch, padded to {pretrained.max_length}": [
                {name: values[start : start + PYTORCH_BATCH] for name, values in whole.items()}
                for start in range(0, rows, PYTORCH_BATCH)
            ],
            "PyTorch, sorted by length": list(
                pytorch.length_sorted(dataset.lengths, whole, PYTORCH_BATCH)
            ),
            "PyTorch, our buckets": [
                {name: getattr(part, name) for name in MODEL_INPUTS}
                for _, part in by_bucket([dataset], PYTORCH_BATCH, buckets)
            ],
        }
        for name, batches in ways.items():
            measures[name] = lambda batches=batches: [last_exit(batch) for batch in batches]
    taken = in_turns(measures, 60 * values.budget_minutes, values.rounds)
    rounds = taken.pop("rounds")
    baseline = taken.get("PyTorch, sorted by length", taken["pool, patience 0"])
    return [
        {
            "way": way,
            "rows": rows,
            "mean exit layer": mean_of.get(way, float(layers)),
            "examples/s": rows / seconds,
            "ms/example": 1000 * seconds / rows,
            "over pool at full depth": taken["pool, patience 0"] / seconds,
            "over PyTorch, sorted": baseline / seconds if values.torch else None,
            "rounds": rounds,
        }
        for way, seconds in taken.items()
    ]


def main(values) -> None:
    if values.checkpoint:
        values.patience = sorted({0, *values.patience})
        records = checkpoint_case(values)
        show(values.checkpoint, records)
        if values.torch:
            show_factors(records)
        names = [each["way"] for each in records]
        bars(
            values.output / "throughput.png",
            names,
            [each["examples/s"] for each in records],
            f"examples per second ({jax.devices()[0].device_kind})",
            "%.0f",
            ["#999999" if "PyTorch" in name else "#3b7dd8" for name in names],
        )
    else:
        records = []
        budget = Budget(values.budget_minutes, len(values.models) * len(values.rows))
        for name in values.models:
            for rows in values.rows:
                here = random_case(name, rows, values, budget.next_case())
                show(f"{name}, {rows} rows of {values.sequence_length} tokens", here)
                records += here
        draw(records, values.output / "throughput.png")
    command_line.save(values.output, "throughput", values, records)


def show_factors(records: list[dict]) -> None:
    """What compiler, padding and exit each contribute to the speed-up over sorted PyTorch."""
    speed = {each["way"]: each["examples/s"] for each in records}
    buckets, pool = speed["PyTorch, our buckets"], speed["pool, patience 0"]
    padding = buckets / speed["PyTorch, sorted by length"]
    print(f"\ncompiler {pool / buckets:.2f}x, padding {padding:.2f}x", end="")
    for way in speed:
        if way.startswith("pool") and way != "pool, patience 0":
            print(f", exit at {way.removeprefix('pool, ')} {speed[way] / pool:.2f}x", end="")
    print()


def show(title: str, records: list[dict]) -> None:
    print(f"\n{title}, {records[0]['rounds']} rounds")
    columns = [name for name in records[0] if name not in ("model", "rows", "rounds")]
    command_line.show(records, columns)


def draw(records: list[dict], path) -> None:
    """Examples per second against the mean exit layer, a line per driver and number of rows."""
    models = list(dict.fromkeys(each["model"] for each in records))
    figure, axes = plt.subplots(1, len(models), figsize=(6 * len(models), 4), squeeze=False)
    colors = {"full": "#777777", "loop": "#d1495b", "pool": "#3b7dd8", "auto": "#66a182"}
    markers = ("o", "^", "s", "d", "v", "P", "*")
    all_rows = list(dict.fromkeys(each["rows"] for each in records))
    for axis, name in zip(axes[0], models, strict=True):
        here = [each for each in records if each["model"] == name]
        for driver, rows in dict.fromkeys((each["driver"], each["rows"]) for each in here):
            line = [each for each in here if (each["driver"], each["rows"]) == (driver, rows)]
            line.sort(key=lambda each: each["mean exit layer"])
            axis.plot(
                [each["mean exit layer"] for each in line],
                [each["examples/s"] for each in line],
                marker=markers[all_rows.index(rows) % len(markers)],
                color=colors.get(driver, "black"),
                lw=1,
                label=f"{driver}, {rows} rows",
            )
        deepest = [each for each in here if each["speed-up"] == 1 and each["driver"] != "PyTorch"]
        best = max(deepest, key=lambda each: each["examples/s"])
        means = np.linspace(best["mean exit layer"] / 4, best["mean exit layer"])
        ideal = best["examples/s"] * best["mean exit layer"] / means
        axis.plot(means, ideal, ":", color="black", lw=1, label="fastest full depth x L / mean")
        axis.set(title=name, xlabel="mean exit layer", ylabel="examples per second", ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _means(text: str) -> list[int]:
    means = command_line.positive_integers(text)
    if max(means) > 12:
        raise argparse.ArgumentTypeError(f"{max(means)} is more than the 12 layers")
    return means


def arguments():
    result = command_line.parser(
        __doc__.splitlines()[0], models="bert-base,albert-base", budget_minutes=25
    )
    positive_integers = command_line.positive_integers
    result.add_argument("--rows", type=positive_integers, default=[1, 4, 16, 64, 256])
    result.add_argument("--sequence_length", type=command_line.positive_integer, default=64)
    result.add_argument("--means", type=_means, default=[4, 6, 8], help="of 12 layers")
    drivers = command_line.names_of(("full", "loop", "pool", "auto"))
    result.add_argument("--drivers", type=drivers, default=["full", "loop", "pool"])
    result.add_argument("--chunk_tokens", type=command_line.positive_integer, help="of the pool")
    result.add_argument("--rounds", type=command_line.positive_integer, default=10)
    result.add_argument("--checkpoint", help="a run directory of train.py")
    result.add_argument("--patience", type=command_line.whole_numbers, default=[0])
    result.add_argument("--regression_threshold", type=float, default=0.0)
    return result


if __name__ == "__main__":
    command_line.run(main, arguments())
