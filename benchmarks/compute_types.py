"""Full depth in float32 and in bfloat16: driver `loop`, beside PyTorch in both types.

    python -m benchmarks.compute_types --model bert-base,albert-base --sequence_length 32,128

All calls of a case take turns. The ratios are time over PyTorch's time in float32 and in bfloat16.
"""

import argparse

import jax
import numpy as np

from benchmarks import command_line, pytorch
from benchmarks.measure import Budget, TimedCall, time_in_turns
from benchmarks.models import random_model, random_tokens
from pabee_jax.criteria import Patience, as_arrays
from pabee_jax.distributed import sharding
from pabee_jax.inference.programs import run_loop
from pabee_jax.models.parameters import in_compute_dtype, split

_TYPES = ("float32", "bfloat16")


def timed_calls_of(name: str, rows: int, length: int, with_torch: bool) -> dict[str, TimedCall]:
    """Return the calls to time, by name; every call waits for its result."""
    timed_calls: dict[str, TimedCall] = {}
    mesh, criterion = sharding.first_device(), as_arrays(Patience(0))
    for dtype in _TYPES:
        model = random_model(name, dtype)
        batch = random_tokens(model.config, rows, length)
        structure, parameters = split(in_compute_dtype(model))
        parameters = sharding.replicate(parameters, mesh)
        row = np.arange(rows, dtype=np.int32)

        def run(structure=structure, parameters=parameters, batch=batch, row=row):
            return jax.device_get(run_loop(structure, mesh, parameters, batch, criterion, row))

        timed_calls[dtype] = run
        if with_torch:
            forward = pytorch.make_forward(model, dtype)
            timed_calls[f"PyTorch {dtype}"] = lambda forward=forward, batch=batch: forward(batch)
    return timed_calls


def main(options) -> None:
    records = []
    budget = Budget(options.budget_minutes, len(options.model) * len(options.sequence_length))
    for name in options.model:
        for length in options.sequence_length:
            calls = timed_calls_of(name, options.batch_size, length, options.torch)
            seconds = time_in_turns(calls, budget.next_case(), options.rounds)
            for call in calls:
                record = {"model": name, "S": length, "program": call, "ms": 1000 * seconds[call]}
                for dtype in _TYPES if options.torch else ():
                    of = f"PyTorch {dtype}"
                    record[f"of {of}"] = seconds[call] / seconds[of]
                records.append(record)
            print()
            command_line.print_records(records[-len(calls) :], list(records[-1]))
    command_line.save(options.output, "compute_types", options, records, figure=False)


def make_parser() -> argparse.ArgumentParser:
    parser = command_line.base_parser(__doc__)
    command_line.add_shapes(parser, "bert-base,albert-base")
    parser.add_argument(
        "--batch_size", type=command_line.positive_integer, default=1, help="rows of a call"
    )
    parser.add_argument("--sequence_length", type=command_line.positive_integers, default=[32, 128])
    command_line.add_budget(parser, 4)
    command_line.add_rounds(parser, 30)
    command_line.add_compilation_cache(parser)
    command_line.add_torch(parser)
    return parser


if __name__ == "__main__":
    command_line.run(main, make_parser())
