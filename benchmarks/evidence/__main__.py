"""The headline of docs/results.md: quality at 1.5, 2 and 3 times the speed, on a real encoder.

    python -m benchmarks.evidence --model DIR --data_dir GLUE --output RESULTS
    python -m benchmarks.evidence --model DIR --data_dir GLUE --output RESULTS --time
    python -m benchmarks.evidence --output RESULTS --table

The first command trains the runs that are missing in RESULTS (one per recipe, task and seed); an
interrupted run is resumed. The second command measures the times of the recorded exit layers of the
runs of --recipes, beside PyTorch at full depth. It needs a quiet machine, but no trained weights.
The third command only prints the tables. Every command writes evidence.json, evidence.png and
criteria.png in RESULTS.

Settings are chosen on one half of the dev rows and shown on the other half, both ways round, so
that every dev row is shown with a setting that was chosen without it.
"""

import argparse
import dataclasses
import json

from benchmarks import command_line
from benchmarks.evidence import figure, tables
from benchmarks.evidence.points import records_of
from benchmarks.evidence.runs import SCHEDULES, recorded, train_missing
from benchmarks.evidence.times import times_of
from benchmarks.measure import Budget, environment
from benchmarks.recipes import RECIPES, RECOMMENDED
from pabee_jax import InputError
from pabee_jax.io.atomic import write_atomically

_DEFAULT_RECIPES = ["ordinary", RECOMMENDED]


def main(options) -> None:
    parser = make_parser()
    if options.time or options.table:
        names = ("save_every",) if options.time else ("model", "data_dir", "save_every")
        command_line.refuse_without_effect(options, parser, names, "with --time and --table")
    else:
        train_missing(options)
    if options.time and not (options.model and options.data_dir):
        raise InputError("--time needs --model and --data_dir")
    if not options.time:
        names = ("budget_minutes", "rounds", "torch", "dtype")
        names += ("drivers", "copies", "chunk_tokens", "torch_batch")
        command_line.refuse_without_effect(options, parser, names, "without --time")
    runs = recorded(options.output)
    if not runs:
        raise InputError(f"--output {options.output} has no finished run")
    path = options.output / "evidence.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    content["records"] = list(records_of(runs))
    if options.time:
        content.setdefault("times", {})
        timed = [
            run
            for run in runs
            if run.recipe in options.recipes
            and run.task in options.task
            and run.seed in options.seeds
        ]
        budget = Budget(options.budget_minutes, len(timed))
        for run in timed:
            times = times_of(run, runs[run], options, budget.next_case())
            name = f"{run.name}, {options.dtype}"
            content["times"][name] = content["times"].get(name, {}) | {
                **dataclasses.asdict(run),
                **times,
                "environment": environment(),
            }
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))
    print(tables.headline(content))
    print()
    print(tables.of_recipes(content))
    print()
    print(tables.of_exits(content))
    print()
    print(tables.of_criteria(runs))
    figure.draw(options.output / "evidence.png", runs, content)
    figure.draw_criteria(options.output / "criteria.png", runs)


def make_parser() -> argparse.ArgumentParser:
    parser = command_line.base_parser(__doc__)
    command_line.add_pretrained_model(parser)
    parser.add_argument("--recipes", type=command_line.names_of(RECIPES), default=_DEFAULT_RECIPES)
    parser.add_argument(
        "--task",
        type=command_line.names_of(SCHEDULES),
        default=list(SCHEDULES),
        help=f"tasks, comma-separated: {', '.join(SCHEDULES)}",
    )
    parser.add_argument("--seeds", type=command_line.whole_numbers, default=[0])
    parser.add_argument(
        "--save_every",
        type=command_line.positive_integer,
        default=100,
        help="training steps between checkpoints (default: %(default)s)",
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--time", action="store_true", help="measure times, and do not train")
    only.add_argument("--table", action="store_true", help="print the tables, and do not train")
    command_line.add_timing(parser, budget_minutes=20, rounds=5)
    parser.add_argument(
        "--drivers",
        type=command_line.names_of(tables.DRIVERS),
        default=list(tables.DRIVERS),
        help=f"drivers to time, comma-separated: {', '.join(tables.DRIVERS)}",
    )
    parser.add_argument(
        "--copies",
        type=command_line.positive_integer,
        default=1,
        help="time this many copies of the dev rows, for a device that dev does not fill",
    )
    parser.add_argument("--chunk_tokens", type=command_line.positive_integer, help="of the pool")
    parser.add_argument(
        "--torch_batch",
        type=command_line.positive_integer,
        default=32,
        help="rows of a batch of PyTorch (default: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    command_line.run(main, make_parser())
