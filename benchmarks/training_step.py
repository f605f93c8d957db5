"""Time of one optimizer step of 32 rows, against PyTorch with the same joint loss.

    python -m benchmarks.training_step

Dropout is active, the optimizer is AdamW, and the loss is the joint loss over all exits. On a CPU,
set the variable GLIBC_TUNABLES as docs/performance.md does, so that the C library does not return
memory to the system after every step.
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import command_line, pytorch
from benchmarks.figures import draw_bars
from benchmarks.measure import Budget, TimedCall, time_in_turns
from benchmarks.models import random_model, random_tokens
from pabee_jax.distributed import sharding
from pabee_jax.models.config import ModelConfig
from pabee_jax.models.flops import of_training_step
from pabee_jax.models.parameters import split, stacked
from pabee_jax.training.config import TrainConfig
from pabee_jax.training.step import initial_state, make_train_step
from pabee_jax.training.strategy import Phase, phase_of

_TOTAL_STEPS = 1_000_000  # Of the learning rate schedule; far fewer are timed.


def random_batch(config: ModelConfig, rows: int, length: int) -> dict[str, np.ndarray]:
    """Return a random training batch without padding."""
    labels = np.arange(rows, dtype=np.int32) % config.num_labels
    return random_tokens(config, rows, length) | {"labels": labels, "valid": np.ones(rows, bool)}


def make_jax_step(model, batch, config: TrainConfig, phase: Phase) -> TimedCall:
    """Return a function that runs one training step and waits for it."""
    mesh = sharding.make_mesh(1)
    structure, parameters = split(stacked(model))
    parameters = jax.tree.map(jnp.copy, parameters)  # The step donates its parameters.
    state = sharding.replicate(initial_state(parameters, config), mesh)
    step = make_train_step(structure, config, _TOTAL_STEPS)
    batch = sharding.shard_batch(batch, mesh)

    def run():
        nonlocal state
        state, metrics = step(state, batch, phase)
        jax.block_until_ready(metrics)

    return run


def main(options) -> None:
    cases = [(name, length) for name in options.model for length in options.sequence_length]
    budget = Budget(options.budget_minutes, len(cases))
    records = []
    for name, length in cases:
        model = random_model(name, options.dtype)
        config = model.config
        batch = random_batch(config, options.batch_size, length)
        joint = phase_of(TrainConfig(), 0, _TOTAL_STEPS, config.num_hidden_layers)
        timed_calls = {"pabee_jax": make_jax_step(model, batch, TrainConfig(), joint)}
        if options.torch:
            timed_calls["PyTorch"] = pytorch.make_training_step(model, batch, options.dtype)
        medians = time_in_turns(timed_calls, budget.next_case(), options.rounds, always_twice=True)
        rounds = medians.pop("rounds")
        tokens = options.batch_size * length
        flops = of_training_step(config, options.batch_size, length)
        case_records = [
            {
                "model": name,
                "S": length,
                "way": way,
                "ms/step": 1000 * seconds,
                "tokens/s": tokens / seconds,
                "GFLOP/s": flops / seconds / 1e9,
                "of PyTorch": seconds / medians["PyTorch"] if options.torch else None,
                "rounds": rounds,
            }
            for way, seconds in medians.items()
        ]
        print()
        command_line.print_records(case_records, list(case_records[0]))
        records += case_records
    draw_bars(
        options.output / "training_step.png",
        [f"{record['model']}, S = {record['S']}: {record['way']}" for record in records],
        [record["ms/step"] for record in records],
        "ms per step",
        "%.0f",
    )
    command_line.save(options.output, "training_step", options, records)


def make_parser():
    parser = command_line.base_parser(__doc__)
    command_line.add_shapes(parser, "minilm")
    command_line.add_timing(parser, budget_minutes=5, rounds=10)
    parser.add_argument("--sequence_length", type=command_line.positive_integers, default=[32, 64])
    parser.add_argument("--batch_size", type=command_line.positive_integer, default=32)
    return parser


if __name__ == "__main__":
    command_line.run(main, make_parser())
