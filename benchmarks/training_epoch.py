"""Time of one training epoch on a task, against PyTorch on the same batches and on padded batches.

    python -m benchmarks.training_epoch --config glue:mrpc --model DIR --data_dir GLUE

For every sequence length that occurs among the epoch's batches, the benchmark times the step on one
batch, in turns with PyTorch. The time of an epoch is the sum over its batches. "padded" is PyTorch
with every row padded to `max_seq_length`, as PyTorch's own GLUE examples do.
"""

import dataclasses
from collections import Counter

import numpy as np

from benchmarks import command_line, pytorch
from benchmarks.measure import Budget, time_in_turns
from benchmarks.training_step import make_jax_step
from pabee_jax.commands.config_file import load_config
from pabee_jax.data.batching import steps_per_epoch, training_batch, training_lengths
from pabee_jax.data.load import load_task
from pabee_jax.distributed import sharding
from pabee_jax.training.config import TrainConfig, check
from pabee_jax.training.start import labeled_examples, starting_point, tokenized
from pabee_jax.training.strategy import phase_of

_ORDERS = ("shuffled", "length_grouped")
_TOTAL_STEPS = 1_000_000  # Of the learning rate schedule; far fewer are timed.


def batches_by_length(dataset, config: TrainConfig) -> dict[int, list[dict[str, np.ndarray]]]:
    """Return the batches of the first epoch by their sequence length."""
    batches: dict[int, list] = {}
    buckets = training_lengths(config.max_seq_length, config.order)
    for step in range(steps_per_epoch(len(dataset), config.batch_size)):
        batch = training_batch(
            dataset, config.batch_size, buckets, config.seed, step, order=config.order
        )
        batches.setdefault(batch["input_ids"].shape[1], []).append(batch)
    return batches


def main(options) -> None:
    config = load_config(options.config)
    config = dataclasses.replace(
        config, model=options.model, data_dir=str(options.data_dir or ""), dtype=options.dtype
    )
    check(config)
    task = load_task(config)
    examples = labeled_examples(task, "train")
    start = starting_point(config, task, examples, sharding.make_mesh(1))
    (dataset,) = tokenized(examples, start).values()
    epochs = {
        order: batches_by_length(dataset, dataclasses.replace(config, order=order))
        for order in _ORDERS
    }
    batches = {length: batches[0] for epoch in epochs.values() for length, batches in epoch.items()}
    # The time of a step does not depend on the values of the tokens.
    (any_batch, *_) = batches.values()
    longest = config.max_seq_length
    batches.setdefault(longest, {**any_batch, **_pad(any_batch, longest)})
    medians = time_steps(start.model, batches, config, options)
    records = []
    for order, epoch in epochs.items():
        counts = Counter({length: len(batches) for length, batches in epoch.items()})
        records.append(record_of(order, counts, medians, longest, with_torch=options.torch))
    print()
    command_line.print_records(records, list(records[0]))
    command_line.save(options.output, "training_epoch", options, records, figure=False)


def time_steps(model, batches, config: TrainConfig, options) -> dict[int, dict[str, float]]:
    """Return the median seconds of a step, by sequence length and framework."""
    phase = phase_of(config, 0, _TOTAL_STEPS, model.config.num_hidden_layers)
    budget = Budget(options.budget_minutes, len(batches))
    medians = {}
    for length, batch in sorted(batches.items()):
        timed_calls = {"pabee_jax": make_jax_step(model, batch, config, phase)}
        if options.torch:
            timed_calls["PyTorch"] = pytorch.make_training_step(model, batch, options.dtype)
        medians[length] = time_in_turns(
            timed_calls, budget.next_case(), options.rounds, always_twice=True
        )
        times = ", ".join(f"{name} {1000 * medians[length][name]:.0f} ms" for name in timed_calls)
        print(f"{length} tokens: {times} per step, {medians[length]['rounds']} rounds", flush=True)
    return medians


def record_of(
    order: str,
    counts: Counter[int],
    medians: dict[int, dict[str, float]],
    longest: int,
    *,
    with_torch: bool,
) -> dict:
    """Return the record of one order of the rows; `counts` is the number of steps per length."""

    def epoch_seconds(name: str) -> float:
        return sum(count * medians[length][name] for length, count in counts.items())

    jax_seconds = epoch_seconds("pabee_jax")
    record = {
        "order": order,
        "steps by tokens": ", ".join(f"{n} x {length}" for length, n in sorted(counts.items())),
        "pabee_jax, s": jax_seconds,
    }
    if with_torch:
        torch_seconds = epoch_seconds("PyTorch")
        padded_seconds = counts.total() * medians[longest]["PyTorch"]
        record |= {
            "PyTorch, same batches, s": torch_seconds,
            "PyTorch, padded, s": padded_seconds,
            "of the same": jax_seconds / torch_seconds,
            "of padded": jax_seconds / padded_seconds,
        }
    return record


def _pad(batch: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
    return {
        name: np.pad(batch[name], ((0, 0), (0, length - batch[name].shape[1])))
        for name in ("input_ids", "attention_mask", "token_type_ids")
    }


def make_parser():
    parser = command_line.base_parser(__doc__)
    command_line.add_pretrained_model(parser)
    command_line.add_timing(parser, budget_minutes=5, rounds=10)
    parser.add_argument("--config", default="glue:mrpc", help="as for pabee-jax train")
    return parser


if __name__ == "__main__":
    command_line.run(main, make_parser())
