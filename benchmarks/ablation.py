"""The cost of comparing patience values: one pass and a replay, or one real run per value.

    python -m benchmarks.ablation
    python -m benchmarks.ablation --checkpoint runs/mrpc

Without --checkpoint, the model has random weights and the shape of --model, and the data are 408
rows of 64 tokens (--sequence_length).
"""

from pathlib import Path

import numpy as np

from benchmarks import command_line, figures, pytorch
from benchmarks.checkpoint import dev_set
from benchmarks.measure import Budget, TimedCall, time_in_turns
from benchmarks.models import random_model, random_tokens
from pabee_jax import EarlyExitClassifier, Patience, replay
from pabee_jax.checkpoints.pretrained import Pretrained
from pabee_jax.data.batching import MODEL_INPUTS

_ROWS = 408  # As many as MRPC's dev set has.


def timed_calls_of(
    pretrained: Pretrained, rows, settings, torch_dtype: str | None
) -> dict[str, TimedCall]:
    """Return the calls to time, by name; PyTorch's is absent if `torch_dtype` is None."""
    full = EarlyExitClassifier(pretrained, driver="full")
    pool = EarlyExitClassifier(pretrained, driver="pool")
    loop = EarlyExitClassifier(pretrained, driver="loop")

    def replay_settings():
        logits = full.all_exit_logits(rows)
        return [np.asarray(replay(setting, logits)[0]) for setting in settings]

    def run_settings(classifier, batch_size=None):
        exit_layers = []
        for setting in settings:
            classifier.criterion = setting
            exit_layers.append(classifier.predict(rows, batch_size).exit_layers)
        return exit_layers

    timed_calls: dict[str, TimedCall] = {
        "one full-depth pass": lambda: full.all_exit_logits(rows),
        f"replay of {len(settings)} settings": replay_settings,
        f"{len(settings)} real runs, pool": lambda: run_settings(pool),
        f"{len(settings)} real runs, loop, one row at a time": lambda: run_settings(loop, 1),
    }
    if torch_dtype is not None:
        forward = pytorch.make_forward(pretrained.model, torch_dtype)
        dataset = full.tokenize(rows)
        tokens = {name: getattr(dataset, name) for name in MODEL_INPUTS}
        timed_calls["one full-depth pass, PyTorch, sorted by length"] = lambda: [
            forward(batch)
            for batch in pytorch.batches_sorted_by_length(dataset.lengths, tokens, 32)
        ]
    return timed_calls


def main(options) -> None:
    settings = [Patience(value, options.regression_threshold) for value in options.patience]
    cases = {}
    if options.checkpoint:
        command_line.refuse_without_effect(
            options, make_parser(), ("model", "sequence_length"), "with --checkpoint"
        )
        cases[options.checkpoint] = dev_set(options.checkpoint, options.dtype)
    else:
        for name in options.model:
            model = random_model(name, options.dtype)
            pretrained = Pretrained(model, None, {}, ("0", "1"), options.sequence_length)
            tokens = random_tokens(model.config, _ROWS, options.sequence_length)
            cases[name] = (pretrained, tokens)
    budget = Budget(options.budget_minutes, len(cases))
    records = []
    for name, (pretrained, rows) in cases.items():
        torch_dtype = options.dtype if options.torch else None
        timed_calls = timed_calls_of(pretrained, rows, settings, torch_dtype)
        medians = time_in_turns(timed_calls, budget.next_case(), options.rounds)
        rounds = medians.pop("rounds")
        case_records = [
            {
                "model": name,
                "way": way,
                "seconds": seconds,
                "of one full-depth pass": seconds / medians["one full-depth pass"],
                "rounds": rounds,
            }
            for way, seconds in medians.items()
        ]
        print(f"\n{name}, {rounds} rounds")
        command_line.print_records(case_records, ["way", "seconds", "of one full-depth pass"])
        records += case_records
    draw(records, options.output / "ablation.png")
    command_line.save(options.output, "ablation", options, records)


def draw(records: list[dict], path: Path) -> None:
    """Draw the time of every way, in full-depth passes of its model."""
    models = {record["model"] for record in records}
    figures.draw_bars(
        path,
        [
            record["way"] if len(models) == 1 else f"{Path(record['model']).name}: {record['way']}"
            for record in records
        ],
        [record["of one full-depth pass"] for record in records],
        "time, in full-depth passes",
        "%.2f",
    )


def make_parser():
    parser = command_line.base_parser(__doc__)
    command_line.add_shapes(parser, "minilm")
    command_line.add_timing(parser, budget_minutes=5, rounds=5)
    parser.add_argument("--sequence_length", type=command_line.positive_integer, default=64)
    parser.add_argument("--patience", type=command_line.whole_numbers, default=[0, 1, 2, 3, 4, 5])
    parser.add_argument("--regression_threshold", type=float, default=0.0)
    parser.add_argument("--checkpoint", help="run directory: measure it on its own dev set")
    return parser


if __name__ == "__main__":
    command_line.run(main, make_parser())
