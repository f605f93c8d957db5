"""Throughput of every driver on many rows, in examples per second, by the mean exit layer.

    python -m benchmarks.throughput
    python -m benchmarks.throughput --checkpoint runs/mrpc --patience 0,3,4,5

Without --checkpoint, models have random weights, rows have the same length, and exit layers are
drawn from a binomial distribution around the given means. With --checkpoint, the model runs on its
own dev set with its real exits, and the benchmark also prints the factors of its speed-up over
PyTorch with length-sorted batches.
"""

import argparse
import functools
import itertools

import jax
import numpy as np

from benchmarks import command_line, figures, pytorch
from benchmarks.checkpoint import dev_set
from benchmarks.exit_schedule import ExitSchedule, binomial_exit_layers
from benchmarks.measure import Budget, time_in_turns
from benchmarks.models import random_model, random_tokens
from pabee_jax import EarlyExitClassifier, Patience
from pabee_jax.checkpoints.pretrained import Pretrained
from pabee_jax.data.batching import MODEL_INPUTS, batches_by_bucket, inference_buckets
from pabee_jax.models.flops import per_token_and_layer

PYTORCH_BATCH = 32
FULL_DEPTH = "full depth"


def classifiers_of(model, length: int, drivers, chunk_tokens) -> dict[str, EarlyExitClassifier]:
    """Return a classifier per driver, without a tokenizer, because its inputs are token ids."""
    pretrained = Pretrained(model, None, {}, ("0", "1"), length)
    return {
        driver: EarlyExitClassifier(pretrained, driver=driver, chunk_tokens=chunk_tokens)
        for driver in drivers
    }


def random_case(name: str, rows: int, options, seconds: float) -> list[dict]:
    """Return the records of a model with random weights on `rows` rows, timed for `seconds`."""
    model = random_model(name, options.dtype)
    config, length = model.config, options.sequence_length
    tokens = random_tokens(config, rows, length)
    schedules = {FULL_DEPTH: np.full(rows, config.num_hidden_layers, np.int32)}
    for mean in options.means:
        model_mean = mean * config.num_hidden_layers / 12
        schedules[mean] = binomial_exit_layers(rows, model_mean, config.num_hidden_layers)
    timed_calls = {}
    for driver, classifier in classifiers_of(
        model, length, options.driver, options.chunk_tokens
    ).items():

        def run(exit_layers, classifier=classifier, driver=driver):
            if driver == "full":  # It runs every layer, whatever the exit layers are.
                return classifier.all_exit_logits(tokens)
            classifier.criterion = ExitSchedule(exit_layers)
            predictions = classifier.predict(tokens)
            np.testing.assert_array_equal(predictions.exit_layers, exit_layers)

        for mean, exit_layers in schedules.items():
            if driver != "full" or mean == FULL_DEPTH:
                timed_calls[driver, mean] = functools.partial(run, exit_layers)
    if options.torch:
        forward = pytorch.make_forward(model, options.dtype)
        lengths = np.full(rows, length)
        timed_calls["PyTorch", FULL_DEPTH] = lambda: [
            forward(batch)
            for batch in pytorch.batches_sorted_by_length(lengths, tokens, PYTORCH_BATCH)
        ]
    medians = time_in_turns(timed_calls, seconds, options.rounds)
    rounds = medians.pop("rounds")
    return records_of(name, rows, length, config, schedules, medians, rounds)


def records_of(name, rows, length, config, schedules, medians, rounds) -> list[dict]:
    """Return one record per driver and mean exit layer."""
    depth = config.num_hidden_layers
    fastest = min(
        seconds
        for (driver, mean), seconds in medians.items()
        if mean == FULL_DEPTH and driver != "PyTorch"
    )
    records = []
    for (driver, mean), seconds in medians.items():
        sample_mean = float(schedules[mean].mean())
        share = sample_mean / depth
        flops = rows * length * depth * per_token_and_layer(config, length)
        records.append(
            {
                "model": name,
                "rows": rows,
                "driver": driver,
                "mean exit layer": sample_mean,
                "examples/s": rows / seconds,
                "ms/example": 1000 * seconds / rows,
                "speed-up": medians[driver, FULL_DEPTH] / seconds,
                "efficiency": medians[driver, FULL_DEPTH] / seconds * share,
                "efficiency over the fastest": fastest / seconds * share,
                "GFLOP/s": flops / seconds / 1e9 if mean == FULL_DEPTH else None,
                "rounds": rounds,
            }
        )
    return records


def checkpoint_case(options) -> list[dict]:
    """Return the records of a trained checkpoint and of PyTorch on the checkpoint's dev set."""
    pretrained, dataset = dev_set(options.checkpoint, options.dtype)
    rows, layers = len(dataset), pretrained.model.config.num_hidden_layers
    full = EarlyExitClassifier(pretrained, driver="full")
    pool = EarlyExitClassifier(pretrained, driver="pool", chunk_tokens=options.chunk_tokens)
    mean_exit_layers = {}

    def run(patience):
        pool.criterion = Patience(patience, options.regression_threshold)
        mean = float(pool.predict(dataset).exit_layers.mean())
        mean_exit_layers[f"pool, patience {patience}"] = mean

    timed_calls = {
        f"pool, patience {value}": functools.partial(run, value) for value in options.patience
    }
    timed_calls["full"] = lambda: full.all_exit_logits(dataset)
    if options.torch:
        forward = pytorch.make_forward(pretrained.model, options.dtype)
        buckets = inference_buckets(pretrained.max_length)
        padded = dataset.resized(pretrained.max_length)
        tokens = {name: getattr(padded, name) for name in MODEL_INPUTS}
        batches_by_way = {
            f"PyTorch, padded to {pretrained.max_length}": [
                {name: array[start : start + PYTORCH_BATCH] for name, array in tokens.items()}
                for start in range(0, rows, PYTORCH_BATCH)
            ],
            "PyTorch, sorted by length": list(
                pytorch.batches_sorted_by_length(dataset.lengths, tokens, PYTORCH_BATCH)
            ),
            "PyTorch, pabee_jax's buckets": [
                {name: getattr(part, name) for name in MODEL_INPUTS}
                for _, part in batches_by_bucket([dataset], PYTORCH_BATCH, buckets)
            ],
        }
        for name, batches in batches_by_way.items():
            timed_calls[name] = lambda batches=batches: [forward(batch) for batch in batches]
    medians = time_in_turns(timed_calls, 60 * options.budget_minutes, options.rounds)
    rounds = medians.pop("rounds")
    torch_seconds = medians.get("PyTorch, sorted by length")
    return [
        {
            "way": way,
            "rows": rows,
            "mean exit layer": mean_exit_layers.get(way, float(layers)),
            "examples/s": rows / seconds,
            "ms/example": 1000 * seconds / rows,
            "over pool at full depth": medians["pool, patience 0"] / seconds,
            "over PyTorch, sorted": torch_seconds and torch_seconds / seconds,
            "rounds": rounds,
        }
        for way, seconds in medians.items()
    ]


def main(options) -> None:
    if options.checkpoint:
        names = ("model", "rows", "sequence_length", "means", "driver")
        command_line.refuse_without_effect(options, make_parser(), names, "with --checkpoint")
        options.patience = sorted({0, *options.patience})
        records = checkpoint_case(options)
        print_case(options.checkpoint, records)
        if options.torch:
            print_factors(records)
        names = [record["way"] for record in records]
        figures.draw_bars(
            options.output / "throughput.png",
            names,
            [record["examples/s"] for record in records],
            f"examples per second ({jax.devices()[0].device_kind})",
            "%.0f",
            [figures.GRAY if "PyTorch" in name else figures.BLUE for name in names],
        )
    else:
        names = ("patience", "regression_threshold")
        command_line.refuse_without_effect(options, make_parser(), names, "without --checkpoint")
        records = []
        budget = Budget(options.budget_minutes, len(options.model) * len(options.rows))
        for name in options.model:
            for rows in options.rows:
                case_records = random_case(name, rows, options, budget.next_case())
                title = f"{name}, {rows} rows of {options.sequence_length} tokens"
                print_case(title, case_records)
                records += case_records
        draw(records, options.output / "throughput.png")
    command_line.save(options.output, "throughput", options, records)


def print_factors(records: list[dict]) -> None:
    """Print the speed-up over length-sorted PyTorch as factors: compiler, padding and exit."""
    speed = {record["way"]: record["examples/s"] for record in records}
    buckets, pool = speed["PyTorch, pabee_jax's buckets"], speed["pool, patience 0"]
    padding = buckets / speed["PyTorch, sorted by length"]
    print(f"\ncompiler {pool / buckets:.2f}x, padding {padding:.2f}x", end="")
    for way in speed:
        if way.startswith("pool") and way != "pool, patience 0":
            print(f", exit at {way.removeprefix('pool, ')} {speed[way] / pool:.2f}x", end="")
    print()


def print_case(title: str, records: list[dict]) -> None:
    """Print the table of one case."""
    print(f"\n{title}, {records[0]['rounds']} rounds")
    columns = [name for name in records[0] if name not in ("model", "rows", "rounds")]
    command_line.print_records(records, columns)


_COLORS = {"full": figures.GRAY, "loop": figures.ORANGE, "pool": figures.BLUE}
_COLORS |= {"auto": figures.GREEN, "PyTorch": figures.BLACK}
_MARKERS = ("o", "^", "s", "d", "v", "P", "*")


def draw(records: list[dict], path) -> None:
    """Draw examples per second against the mean exit layer, a line per driver and row count."""
    models = list(dict.fromkeys(record["model"] for record in records))
    figure, axes = figures.panels(len(models), height=3.4)
    row_counts = dict.fromkeys(record["rows"] for record in records)
    markers = dict(zip(row_counts, itertools.cycle(_MARKERS), strict=False))
    for axis, name in zip(axes, models, strict=True):
        of_model = [record for record in records if record["model"] == name]
        lines: dict[tuple[str, int], list[dict]] = {}
        for record in of_model:
            lines.setdefault((record["driver"], record["rows"]), []).append(record)
        for (driver, rows), line in lines.items():
            line.sort(key=lambda record: record["mean exit layer"])
            axis.plot(
                [record["mean exit layer"] for record in line],
                [record["examples/s"] for record in line],
                # The marks of programs that run all layers lie on each other.
                marker="x" if driver == "PyTorch" else markers[rows],
                markersize=9 if driver == "full" else 6,
                color=_COLORS[driver],
                label=f"{driver}, {rows} rows",
            )
        full_depth = [
            record
            for record in of_model
            if record["speed-up"] == 1 and record["driver"] != "PyTorch"
        ]
        fastest = max(full_depth, key=lambda record: record["examples/s"])
        means = np.linspace(fastest["mean exit layer"] / 4, fastest["mean exit layer"])
        ideal = fastest["examples/s"] * fastest["mean exit layer"] / means
        axis.plot(means, ideal, ":", color="black", label="full depth x layers / mean exit layer")
        axis.set(title=name, xlabel="mean exit layer", ylabel="examples per second", ylim=(0, None))
    figures.save(figure, path)


def _means(text: str) -> list[int]:
    means = command_line.positive_integers(text)
    if max(means) > 12:
        raise argparse.ArgumentTypeError(f"{max(means)} is more than the 12 layers")
    return means


def make_parser():
    parser = command_line.base_parser(__doc__)
    command_line.add_shapes(parser, "bert-base,albert-base")
    command_line.add_timing(parser, budget_minutes=25, rounds=10)
    parser.add_argument(
        "--rows",
        type=command_line.positive_integers,
        default=[1, 4, 16, 64, 256],
        help="rows per call, comma-separated; the driver divides them into batches",
    )
    parser.add_argument("--sequence_length", type=command_line.positive_integer, default=64)
    parser.add_argument("--means", type=_means, default=[4, 6, 8], help="of 12 layers")
    parser.add_argument(
        "--driver",
        type=command_line.names_of(("full", "loop", "pool", "auto")),
        default=["full", "loop", "pool"],
        help="drivers, comma-separated: full, loop, pool, auto",
    )
    parser.add_argument("--chunk_tokens", type=command_line.positive_integer, help="of the pool")
    parser.add_argument("--checkpoint", help="run directory: measure it on its own dev set")
    parser.add_argument("--patience", type=command_line.whole_numbers, default=[0])
    parser.add_argument("--regression_threshold", type=float, default=0.0)
    return parser


if __name__ == "__main__":
    command_line.run(main, make_parser())
