"""The time to compile a training step or the programs of a driver, by the number of layers.

    python -m benchmarks.compile_time --model bert-base --layers 6,12,24
    python -m benchmarks.compile_time --model bert-base,minilm --programs pool,few,loop

The programs are traced and compiled but not run. No program from an earlier compilation is reused.
"""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import command_line
from benchmarks.models import SHAPES
from benchmarks.training_step import random_batch
from pabee_jax.criteria import Patience, as_arrays
from pabee_jax.data.batching import MODEL_INPUTS
from pabee_jax.distributed import sharding
from pabee_jax.drivers.ragged import RaggedBatch
from pabee_jax.inference import planning
from pabee_jax.inference.programs import run_loop, run_pool
from pabee_jax.models.config import ModelConfig
from pabee_jax.models.encoder import EarlyExitModel
from pabee_jax.models.parameters import in_compute_dtype, split, stacked
from pabee_jax.training.config import TrainConfig
from pabee_jax.training.step import initial_state, make_train_step
from pabee_jax.training.strategy import phase_of

_TOTAL_STEPS = 1_000_000  # Of the learning rate schedule.
_PROGRAMS = ("train", "loop", "pool", "few")


def main(options) -> None:
    records = []
    for name in options.model:
        for program, pooling in programs_of(options):
            first_seconds = 0.0
            for layers in options.layers or [SHAPES[name]["num_hidden_layers"]]:
                values = SHAPES[name] | {"num_hidden_layers": layers}
                if pooling:
                    values |= {"exit_pooling": pooling, "exit_pooler": "per_exit"}
                config = ModelConfig.from_hugging_face(values, 2)
                samples = [seconds_of(program, config, options) for _ in range(options.rounds)]
                trace_seconds, compile_seconds = map(statistics.median, zip(*samples, strict=True))
                seconds = trace_seconds + compile_seconds
                first_seconds = first_seconds or seconds
                records.append(
                    {
                        "model": name,
                        "program": f"{program} {pooling}".strip(),
                        "layers": layers,
                        "trace, s": trace_seconds,
                        "compile, s": compile_seconds,
                        "of the first": seconds / first_seconds,
                    }
                )
    command_line.print_records(records, list(records[0]))
    command_line.save(options.output, "compile_time", options, records, figure=False)


def programs_of(options) -> list[tuple[str, str]]:
    """Return the programs, each with what its exits read; "" for the training step."""
    return [
        (program, pooling)
        for program in options.programs
        for pooling in ([""] if program == "train" else ["cls", "mean"])
    ]


def seconds_of(program: str, config: ModelConfig, options) -> tuple[float, float]:
    """Return the seconds to trace and lower a program, and the seconds to compile it."""
    jax.clear_caches()
    model = jax.eval_shape(lambda: EarlyExitModel(config, dtype=options.dtype, rngs=nnx.Rngs(0)))
    lower = lower_step if program == "train" else functools.partial(lower_driver, program)
    start = time.perf_counter()
    lowered = lower(config, model, options)
    traced = time.perf_counter()
    lowered.compile()
    return traced - start, time.perf_counter() - traced


def lower_step(config: ModelConfig, model: EarlyExitModel, options):
    train_config = TrainConfig(dtype=options.dtype)
    structure, parameters = split(jax.eval_shape(stacked, model))
    state = jax.eval_shape(lambda parameters: initial_state(parameters, train_config), parameters)
    step = make_train_step(structure, train_config, _TOTAL_STEPS)
    batch = random_batch(config, options.batch_size, options.sequence_length)
    phase = phase_of(train_config, 0, _TOTAL_STEPS, config.num_hidden_layers)
    return step.func.lower(state, batch, phase, **step.keywords)


def lower_driver(program: str, config: ModelConfig, model: EarlyExitModel, options):
    """Lower the program of `loop` for one row, of the pool ("pool"), or of its few rows ("few")."""
    mesh, criterion = sharding.first_device(), as_arrays(Patience(1))
    structure, parameters = split(jax.eval_shape(in_compute_dtype, model))

    def integers(*shape: int):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    if program == "loop":
        batch = {name: integers(1, options.sequence_length) for name in MODEL_INPUTS}
        return run_loop.lower(structure, mesh, parameters, batch, criterion, integers(1))
    few, many = planning.pool_plans(config, mesh, config.max_length)
    plan = few if program == "few" else many
    tokens, row = integers(plan.tokens_per_device), integers(plan.rows_per_device)
    batch = RaggedBatch(tokens, tokens, tokens, tokens, row)
    arguments = (structure, mesh, parameters, batch, criterion, row)
    return run_pool.lower(*arguments, sizes=plan.sizes)


def make_parser():
    parser = command_line.base_parser(__doc__)
    command_line.add_shapes(parser, "bert-base")
    command_line.add_dtype(parser)
    command_line.add_rounds(parser, 3)
    parser.add_argument("--layers", type=command_line.positive_integers, help="default: its own")
    parser.add_argument("--programs", type=command_line.names_of(_PROGRAMS), default=["train"])
    parser.add_argument("--sequence_length", type=command_line.positive_integer, default=128)
    parser.add_argument("--batch_size", type=command_line.positive_integer, default=32)
    return parser


if __name__ == "__main__":
    command_line.run(main, make_parser())
