"""The time to compile a training step, by the number of layers.

    python -m benchmarks.compile_time --model bert-base --layers 6,12,24

The step is traced and compiled but not run. No program from an earlier compilation is reused.
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

_TOTAL_STEPS = 1_000_000  # Of the learning rate schedule.


def main(options) -> None:
    records, first_seconds = [], 0.0
    for name in options.model:
        for layers in options.layers:
            config = ModelConfig.from_hugging_face(SHAPES[name] | {"num_hidden_layers": layers}, 2)
            samples = [seconds_of(config, options) for _ in range(options.rounds)]
            trace_seconds, compile_seconds = map(statistics.median, zip(*samples, strict=True))
            seconds = trace_seconds + compile_seconds
            first_seconds = seconds if layers == options.layers[0] else first_seconds
            records.append(
                {
                    "model": name,
                    "layers": layers,
                    "trace, s": trace_seconds,
                    "compile, s": compile_seconds,
                    "of the first": seconds / first_seconds,
                }
            )
    command_line.print_records(records, list(records[0]))
    command_line.save(options.output, "compile_time", options, records, figure=False)


def seconds_of(config: ModelConfig, options) -> tuple[float, float]:
    """Return the seconds to trace and lower one training step, and the seconds to compile it."""
    jax.clear_caches()
    train_config = TrainConfig(dtype=options.dtype)
    model = jax.eval_shape(lambda: EarlyExitModel(config, dtype=options.dtype, rngs=nnx.Rngs(0)))
    structure, parameters = split(jax.eval_shape(stacked, model))
    state = jax.eval_shape(lambda parameters: initial_state(parameters, train_config), parameters)
    step = make_train_step(structure, train_config, _TOTAL_STEPS)
    batch = random_batch(config, options.batch_size, options.sequence_length)
    phase = phase_of(train_config, 0, _TOTAL_STEPS, config.num_hidden_layers)
    start = time.perf_counter()
    lowered = step.func.lower(state, batch, phase, **step.keywords)
    traced = time.perf_counter()
    lowered.compile()
    return traced - start, time.perf_counter() - traced


def make_parser():
    parser = command_line.base_parser(__doc__)
    command_line.add_shapes(parser, "bert-base")
    command_line.add_dtype(parser)
    command_line.add_rounds(parser, 3)
    parser.add_argument("--layers", type=command_line.positive_integers, default=[6, 12, 24])
    parser.add_argument("--sequence_length", type=command_line.positive_integer, default=128)
    parser.add_argument("--batch_size", type=command_line.positive_integer, default=32)
    return parser


if __name__ == "__main__":
    command_line.run(main, make_parser())
