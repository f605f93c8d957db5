"""One optimiser step: milliseconds per step of 32 rows, beside PyTorch's with the same joint loss.

    python -m benchmarks.training_step

Dropout is active, the optimiser is AdamW, the loss is the joint one over all exits. For a CPU,
docs/performance.md says how to keep the C library from giving memory back after every step.
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import command_line, pytorch
from benchmarks.figures import bars
from benchmarks.measure import Budget, in_turns
from benchmarks.models import random_model, random_tokens
from pabee_jax.distributed import sharding
from pabee_jax.models.config import ModelConfig
from pabee_jax.models.flops import of_training_step
from pabee_jax.models.parameters import split, stacked
from pabee_jax.training.config import TrainConfig
from pabee_jax.training.step import initial_state, make_train_step
from pabee_jax.training.strategy import Phase, phase_of

_STEPS = 1_000_000  # Of the schedule; far more than are timed.


def random_batch(config: ModelConfig, rows: int, length: int) -> dict[str, np.ndarray]:
    """Full rows with labels."""
    labels = np.arange(rows, dtype=np.int32) % config.num_labels
    return random_tokens(config, rows, length) | {"labels": labels, "valid": np.ones(rows, bool)}


def jax_step(model, batch, config: TrainConfig, phase: Phase):
    """A call that makes one step and waits for it."""
    mesh = sharding.make_mesh(1)
    graph, parameters = split(stacked(model))
    parameters = jax.tree.map(jnp.copy, parameters)  # A step takes over what it is given.
    state = sharding.replicate(initial_state(parameters, config), mesh)
    step = make_train_step(graph, config, _STEPS)
    batch = sharding.shard_batch(batch, mesh)

    def run():
        nonlocal state
        state, metrics = step(state, batch, phase)
        jax.block_until_ready(metrics)

    return run


def main(values) -> None:
    cases = [(name, length) for name in values.models for length in values.sequence_lengths]
    budget = Budget(values.budget_minutes, len(cases))
    records = []
    for name, length in cases:
        model = random_model(name, values.dtype)
        config = model.config
        batch = random_batch(config, values.batch_size, length)
        joint = phase_of(TrainConfig(), 0, _STEPS, config.num_hidden_layers)
        measures = {"pabee_jax": jax_step(model, batch, TrainConfig(), joint)}
        if values.torch:
            measures["PyTorch"] = pytorch.training_step(model, batch, values.dtype)
        taken = in_turns(measures, budget.next_case(), values.rounds, always_twice=True)
        rounds = taken.pop("rounds")
        tokens = values.batch_size * length
        flops = of_training_step(config, values.batch_size, length)
        here = [
            {
                "model": name,
                "S": length,
                "way": way,
                "ms/step": 1000 * seconds,
                "tokens/s": tokens / seconds,
                "GFLOP/s": flops / seconds / 1e9,
                "of PyTorch": seconds / taken["PyTorch"] if values.torch else None,
                "rounds": rounds,
            }
            for way, seconds in taken.items()
        ]
        columns = list(here[0])
        print()
        command_line.show(here, columns)
        records += here
    bars(
        values.output / "training_step.png",
        [f"{each['model']}, S = {each['S']}: {each['way']}" for each in records],
        [each["ms/step"] for each in records],
        "ms per step",
        "%.0f",
    )
    command_line.save(values.output, "training_step", values, records)


def arguments():
    result = command_line.parser(__doc__.splitlines()[0], models="minilm", budget_minutes=5)
    result.add_argument("--sequence_lengths", type=command_line.positive_integers, default=[32, 64])
    result.add_argument("--batch_size", type=command_line.positive_integer, default=32)
    result.add_argument("--rounds", type=command_line.positive_integer, default=10)
    return result


if __name__ == "__main__":
    command_line.run(main, arguments())
