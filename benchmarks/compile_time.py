"""How long a training step takes to compile, by depth.

    python -m benchmarks.compile_time --models bert-base --layers 6,12,24

Nothing is run, and nothing that was compiled before is used.
"""

import statistics
import time

import jax
from flax import nnx

from benchmarks import command_line
from benchmarks.models import SHAPES
from benchmarks.training_step import random_batch
from pabee_jax.models.config import ModelConfig
from pabee_jax.models.encoder import EarlyExitModel
from pabee_jax.models.parameters import split, stacked
from pabee_jax.training.config import TrainConfig
from pabee_jax.training.step import initial_state, make_train_step
from pabee_jax.training.strategy import phase_of

_STEPS = 1_000_000  # Of the schedule.


def main(values) -> None:
    records, first = [], 0.0
    for name in values.models:
        for layers in values.layers:
            config = ModelConfig.from_hugging_face(SHAPES[name] | {"num_hidden_layers": layers}, 2)
            taken = [compile_seconds(config, values) for _ in range(values.rounds)]
            trace, compilation = map(statistics.median, zip(*taken, strict=True))
            whole = trace + compilation
            first = whole if layers == values.layers[0] else first
            records.append(
                {
                    "model": name,
                    "layers": layers,
                    "trace, s": trace,
                    "compile, s": compilation,
                    "of the first": whole / first,
                }
            )
    command_line.show(records, list(records[0]))
    command_line.save(values.output, "compile_time", values, records, picture=False)


def compile_seconds(config: ModelConfig, values) -> tuple[float, float]:
    """To trace and lower one training step, and to compile it, with nothing kept from before."""
    jax.clear_caches()
    settings = TrainConfig(dtype=values.dtype)
    model = jax.eval_shape(lambda: EarlyExitModel(config, dtype=values.dtype, rngs=nnx.Rngs(0)))
    graph, parameters = split(jax.eval_shape(stacked, model))
    state = jax.eval_shape(lambda parameters: initial_state(parameters, settings), parameters)
    step = make_train_step(graph, settings, _STEPS)
    batch = random_batch(config, values.batch_size, values.sequence_length)
    phase = phase_of(settings, 0, _STEPS, config.num_hidden_layers)
    start = time.perf_counter()
    lowered = step.func.lower(state, batch, phase, **step.keywords)
    traced = time.perf_counter()
    lowered.compile()
    return traced - start, time.perf_counter() - traced


def arguments():
    result = command_line.parser(__doc__.splitlines()[0], models="bert-base", budget_minutes=5)
    result.add_argument("--layers", type=command_line.positive_integers, default=[6, 12, 24])
    result.add_argument("--sequence_length", type=command_line.positive_integer, default=128)
    result.add_argument("--batch_size", type=command_line.positive_integer, default=32)
    result.add_argument("--rounds", type=command_line.positive_integer, default=3)
    return result


if __name__ == "__main__":
    command_line.run(main, arguments())
