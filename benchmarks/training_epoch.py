"""An epoch of training on a task's rows, beside PyTorch's: the same batches, and padded ones.

    python -m benchmarks.training_epoch --config configs/glue.py:mrpc --model DIR --data_dir GLUE

Each shape that the epoch's batches have is timed on one of them, in turns; an epoch is the sum over
its batches. "padded" is PyTorch with every row padded to `max_seq_length`, as its examples do.
"""

import dataclasses
from collections import Counter

import numpy as np

from benchmarks import command_line, pytorch
from benchmarks.measure import Budget, in_turns
from benchmarks.training_step import jax_step
from pabee_jax.commands.config_file import load_config
from pabee_jax.data.batching import sequence_buckets, steps_per_epoch, training_batch
from pabee_jax.data.load import load_task
from pabee_jax.training.config import TrainConfig, check
from pabee_jax.training.start import labeled_examples, starting_point, tokenized
from pabee_jax.training.strategy import phase_of

_ORDERS = ("shuffled", "length_grouped")


def batches_of_epoch(dataset, config: TrainConfig) -> dict[int, list[dict[str, np.ndarray]]]:
    """The batches of the first epoch by their sequence length."""
    found: dict[int, list] = {}
    buckets = sequence_buckets(config.max_seq_length)
    for step in range(steps_per_epoch(len(dataset), config.batch_size)):
        batch = training_batch(
            dataset, config.batch_size, buckets, config.seed, step, order=config.order
        )
        found.setdefault(batch["input_ids"].shape[1], []).append(batch)
    return found


def main(values) -> None:
    config = load_config(values.config)
    config = dataclasses.replace(
        config, model=values.model, data_dir=values.data_dir, dtype=values.dtype
    )
    check(config)
    task = load_task(config)
    parts = labeled_examples(task, "train")
    start = starting_point(config, task, parts)
    (dataset,) = tokenized(parts, start).values()
    exits = start.model.config.num_hidden_layers
    epochs = {
        order: batches_of_epoch(dataset, dataclasses.replace(config, order=order))
        for order in _ORDERS
    }
    shapes = {length: batches[0] for epoch in epochs.values() for length, batches in epoch.items()}
    # Nothing that is timed depends on what the tokens are.
    (some, *_) = shapes.values()
    width = config.max_seq_length
    shapes.setdefault(width, {**some, **_padded(some, width)})
    budget = Budget(values.budget_minutes, len(shapes))
    taken = {}
    for length, batch in sorted(shapes.items()):
        phase = phase_of(config, 0, 1_000_000, exits)
        measures = {"pabee_jax": jax_step(start.model, batch, config, phase)}
        if values.torch:
            measures["PyTorch"] = pytorch.training_step(start.model, batch, values.dtype)
        taken[length] = in_turns(measures, budget.next_case(), values.rounds, always_twice=True)
        told = ", ".join(f"{way} {1000 * taken[length][way]:.0f} ms" for way in measures)
        print(f"{length} tokens: {told} a step, {taken[length]['rounds']} rounds", flush=True)
    records = []
    for order, epoch in epochs.items():
        counts = Counter({length: len(batches) for length, batches in epoch.items()})
        seconds = {
            way: sum(count * taken[length][way] for length, count in counts.items())
            for way in measures
        }
        record = {
            "order": order,
            "steps by tokens": ", ".join(f"{n} x {length}" for length, n in sorted(counts.items())),
            "pabee_jax, s": seconds["pabee_jax"],
        }
        if values.torch:
            padded = counts.total() * taken[width]["PyTorch"]
            record |= {
                "PyTorch, same batches, s": seconds["PyTorch"],
                "PyTorch, padded, s": padded,
                "of the same": seconds["pabee_jax"] / seconds["PyTorch"],
                "of padded": seconds["pabee_jax"] / padded,
            }
        records.append(record)
    print()
    command_line.show(records, list(records[0]))
    command_line.save(values.output, "training_epoch", values, records, picture=False)


def _padded(batch: dict[str, np.ndarray], width: int) -> dict[str, np.ndarray]:
    return {
        name: np.pad(batch[name], ((0, 0), (0, width - batch[name].shape[1])))
        for name in ("input_ids", "attention_mask", "token_type_ids")
    }


def arguments():
    result = command_line.parser(__doc__.splitlines()[0], models="minilm", budget_minutes=5)
    result.add_argument("--config", default="configs/glue.py:mrpc")
    result.add_argument("--model", default="", help="a directory or a hub id")
    result.add_argument("--data_dir", default="")
    result.add_argument("--rounds", type=command_line.positive_integer, default=10)
    return result


if __name__ == "__main__":
    command_line.run(main, arguments())
