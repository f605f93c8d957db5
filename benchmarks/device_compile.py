"""Compiles the programs for a TPU pod or for GPUs, without one: their memory and communication.

    pip install --no-deps libtpu==0.0.42.1   # the version for the installed jax
    python -m benchmarks.device_compile --topology v5e:16x16 --model bert-large --batch_size 8192

    pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-nvvm
    python -m benchmarks.device_compile --topology h100:8 --model bert-large --batch_size 256

The programs are the training step and the drivers `loop` and `pool`, as pabee_jax compiles them.
For every program, the benchmark prints per device: memory, floating-point operations, bytes read
and written, and every collective with its size.
"""

import argparse
import functools
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

# Set before jax is imported, so that neither the compiler nor this process looks for a TPU or tries
# kernels on a GPU.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import command_line
from benchmarks.gpu_targets import GPU_TARGETS
from benchmarks.models import SHAPES
from pabee_jax.criteria import Patience, as_arrays
from pabee_jax.distributed import sharding
from pabee_jax.drivers.ragged import RaggedBatch
from pabee_jax.errors import InputError, first_line_of
from pabee_jax.inference import planning
from pabee_jax.inference.programs import run_loop, run_pool
from pabee_jax.models.config import ModelConfig
from pabee_jax.models.encoder import EarlyExitModel
from pabee_jax.models.parameters import in_compute_dtype, split, stacked
from pabee_jax.training.config import TrainConfig, check
from pabee_jax.training.step import initial_state, make_train_step
from pabee_jax.training.strategy import phase_of

_TOTAL_STEPS = 1_000_000  # Of the learning rate schedule.
# GiB per chip, from the vendor's data sheets.
_MEMORY_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "h100": 80}
_BITS = {"pred": 8, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32}
_KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_COLLECTIVE = re.compile(rf"= (?P<shape>\S.*?) (?P<kind>{'|'.join(_KINDS)})(?:-start)?\(")
_ARRAY = re.compile(rf"({'|'.join(_BITS)})\[([\d,]*)\]")
_PROGRAMS = ("train", "loop", "pool")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_WHILE_BODY = re.compile(r"\bwhile\(.*body=%?([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=\{?(%?[\w.\-, %]+)")


class Collective(NamedTuple):
    """A collective operation of a compiled program.

    Attributes:
        kind: its name, such as "all-reduce".
        bytes: the size of its result, per device.
        in_loop: whether it is inside a loop and therefore may run several times.
    """

    kind: str
    bytes: int
    in_loop: bool


def collectives(text: str) -> list[Collective]:
    """Return every collective in the text of a compiled program, the largest first."""
    collectives, in_loops = [], _computations_in_loops(text)
    for computation, line in _lines(text):
        if match := _COLLECTIVE.search(line):
            size = sum(
                _BITS[dtype] // 8 * int(np.prod([int(n) for n in dims.split(",") if n]))
                for dtype, dims in _ARRAY.findall(match["shape"])
            )
            collectives.append(Collective(match["kind"], size, computation in in_loops))
    return sorted(collectives, key=lambda collective: -collective.bytes)


def _lines(text: str) -> Iterator[tuple[str, str]]:
    """Yield every line with the name of its computation."""
    computation = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            computation = match[1]
        yield computation, line


def _computations_in_loops(text: str) -> set[str]:
    """Return the names of the loop bodies and of the computations that they call."""
    calls: dict[str, set[str]] = {}
    bodies = set()
    for computation, line in _lines(text):
        bodies |= set(_WHILE_BODY.findall(line))
        for names in _CALLED.findall(line):
            called = {name.strip().lstrip("%") for name in names.split(",")}
            calls.setdefault(computation, set()).update(called)
    in_loops, new = set(), bodies
    while new:
        in_loops |= new
        new = set().union(*(calls.get(name, set()) for name in new)) - in_loops
    return in_loops


def platform_of(topology: str) -> str:
    """Return the platform of a topology, "tpu" or "cuda"."""
    return "cuda" if topology.partition(":")[0] in GPU_TARGETS else "tpu"


def mesh_of(topology: str, model: int) -> Mesh:
    """Return the training mesh over the devices of a TPU pod or over the GPUs of one machine.

    Args:
        topology: a pod as libtpu names it, such as "v5e:2x4", or a GPU and their number, such as
            "h100:8".
        model: the size of the mesh axis `model`.

    Raises:
        InputError: libtpu or JAX's plugin for CUDA is missing, the topology is unknown, or `model`
            does not divide its number of devices.
    """
    try:
        if platform_of(topology) == "tpu":
            pod = topologies.get_topology_desc(platform="tpu", topology_name=topology)
        else:
            gpu, _, gpus = topology.partition(":")
            # Groups of machines x machines x GPUs per machine.
            pod = topologies.get_topology_desc(
                platform="cuda", topology=f"1x1x{int(gpus)}", target_config=GPU_TARGETS[gpu]
            )
    except Exception as error:
        reason = first_line_of(error)
        raise InputError(
            f"--topology {topology}: {reason}; install the libtpu or the CUDA plugin for jax "
            f"{jax.__version__}, and give a name such as v5e:2x4 or h100:8"
        ) from error
    count = len(pod.devices)
    if count % model:
        raise InputError(f"--mesh_model {model} does not divide the {count} devices of {topology}")
    return sharding.mesh_of(pod.devices, model)


def programs(options, mesh: Mesh) -> Iterator[tuple[str, Any]]:
    """Yield the name of every program in `--programs`, and the lowered program."""
    rows, length = options.batch_size, options.sequence_length
    config = ModelConfig.from_hugging_face(SHAPES[options.model], 2)
    sharding.check_model(config, mesh, shard_parameters=options.shard_parameters)
    sharding.check_batch_size(rows, options.gradient_accumulation, mesh)
    model = jax.eval_shape(lambda: EarlyExitModel(config, dtype=options.dtype, rngs=nnx.Rngs(0)))
    over_rows = NamedSharding(mesh, PartitionSpec(sharding.DATA))

    def abstract(shape, dtype, sharding=over_rows):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    inputs = ("input_ids", "attention_mask", "token_type_ids")
    batch = {name: abstract((rows, length), jnp.int32) for name in inputs}
    if "train" in options.programs:
        yield "training step", _training_step(options, config, model, mesh, batch, abstract)
    structure, parameters = split(jax.eval_shape(in_compute_dtype, model))
    replicated = sharding.replicated(mesh)
    parameters, criterion = jax.tree.map(
        lambda leaf: abstract(leaf.shape, leaf.dtype, replicated),
        (parameters, as_arrays(Patience(options.patience))),
    )
    row = abstract((rows,), jnp.int32)
    tokens = abstract((rows * length,), jnp.int32)
    sizes = planning.ACCELERATOR.large_sizes(length, options.chunk_tokens)
    pool = functools.partial(run_pool.trace, sizes=sizes)
    drivers = {
        "loop": (run_loop.trace, batch),
        "pool": (pool, RaggedBatch(tokens, tokens, tokens, tokens, row)),
    }
    for name, (trace, inputs) in drivers.items():
        if name in options.programs:
            traced = trace(structure, mesh, parameters, inputs, criterion, row)
            yield (
                f"driver {name}",
                traced.lower(lowering_platforms=(platform_of(options.topology),)),
            )


def _training_step(options, config: ModelConfig, model, mesh: Mesh, batch, abstract):
    train_config = TrainConfig(
        dtype=options.dtype,
        rematerialize=options.rematerialize,
        gradient_accumulation=options.gradient_accumulation,
    )
    check(train_config)
    structure, parameters = split(jax.eval_shape(stacked, model))
    state = jax.eval_shape(lambda parameters: initial_state(parameters, train_config), parameters)
    state_shardings = sharding.shardings(state, mesh, shard_parameters=options.shard_parameters)
    state = jax.tree.map(
        lambda leaf, sharding: abstract(leaf.shape, leaf.dtype, sharding), state, state_shardings
    )
    rows = options.batch_size
    labels = {"labels": abstract((rows,), jnp.int32), "valid": abstract((rows,), bool)}
    step = make_train_step(structure, train_config, _TOTAL_STEPS, state_shardings)
    phase = phase_of(train_config, 0, _TOTAL_STEPS, config.num_hidden_layers)
    return step.func.trace(state, batch | labels, phase, **step.keywords).lower(
        lowering_platforms=(platform_of(options.topology),)
    )


def report(name: str, lowered, memory_gib: float | None) -> dict[str, Any]:
    """Compile a program, print its costs per device and return them as a record.

    The compiler counts the operations of a loop's body once, not once per iteration.

    Args:
        name: the name of the program.
        lowered: the lowered program.
        memory_gib: the memory of a device; None if it is unknown.
    """
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = first_line_of(error)
        print(f"\n{name}: DOES NOT FIT: {reason}")
        return {"program": name, "fits": False, "reason": reason}
    seconds = time.perf_counter() - start
    memory, cost = compiled.memory_analysis(), _cost(compiled)
    arrays = memory.argument_size_in_bytes + memory.output_size_in_bytes
    # A donated argument and its output share their memory.
    arrays -= memory.alias_size_in_bytes
    total = (arrays + memory.temp_size_in_bytes) / 2**30
    program_collectives = collectives(compiled.as_text())
    record = {
        "program": name,
        "fits": memory_gib is None or total <= memory_gib,
        "gib": total,
        "arguments_gib": memory.argument_size_in_bytes / 2**30,
        "temporary_gib": memory.temp_size_in_bytes / 2**30,
        "gflops": cost.get("flops", 0.0) / 1e9,
        "gbytes": cost.get("bytes accessed", 0.0) / 1e9,
        "compile_s": seconds,
        "collectives": [collective._asdict() for collective in program_collectives],
    }
    chip = "" if memory_gib is None else f" of {memory_gib} GiB"
    print(f"\n{name}: compiled in {seconds:.0f} s; per device:")
    print(
        f"  memory {total:.2f}{chip} (arguments {record['arguments_gib']:.2f}, temporary "
        f"{record['temporary_gib']:.2f}): {'fits' if record['fits'] else 'DOES NOT FIT'}"
    )
    if record["gflops"]:  # XLA's compiler for GPUs does not count them.
        print(
            f"  {record['gflops']:.4g} GFLOP, {record['gbytes']:.4g} GB of memory traffic "
            "(a loop's body is counted once)"
        )
    _print_collectives(program_collectives)
    return record


def _print_collectives(collectives: list[Collective]) -> None:
    if not collectives:
        print("  no collective")
    counts = Counter(collectives)
    for collective, count in sorted(counts.items(), key=lambda item: -item[0].bytes):
        where = ", inside a loop" if collective.in_loop else ""
        mebibytes = collective.bytes / 2**20
        print(f"  {count} x {collective.kind} of {mebibytes:.4g} MiB{where}")


def _cost(compiled) -> dict[str, float]:
    cost = compiled.cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost) or {}


def main(options) -> None:
    _refuse_without_effect(options)
    mesh = mesh_of(options.topology, options.mesh_model)
    generation = options.topology.partition(":")[0]
    shape = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    rows = options.batch_size // mesh.shape[sharding.DATA]
    print(
        f"{options.model} on {options.topology} ({mesh.size} devices, {shape}), {options.dtype}, "
        f"{options.batch_size} rows of {options.sequence_length} tokens: {rows} per data shard"
    )
    memory = _MEMORY_GIB.get(generation)
    records = [report(name, lowered, memory) for name, lowered in programs(options, mesh)]
    name = f"device_compile-{options.model}-{options.topology.replace(':', '-')}"
    command_line.save(options.output, name, options, records, figure=False)
    if not all(record["fits"] for record in records):
        raise InputError(
            "a program does not fit into the memory of a device: try --rematerialize, "
            "--gradient_accumulation 2, --shard_parameters, --mesh_model 2, or a smaller "
            "--batch_size"
        )


def _refuse_without_effect(options) -> None:
    """Raise InputError for an option of a program that is not in `--programs`."""
    options_of_programs = {
        ("train",): ("rematerialize", "gradient_accumulation", "shard_parameters"),
        ("loop", "pool"): ("patience",),
        ("pool",): ("chunk_tokens",),
    }
    for needed, names in options_of_programs.items():
        if not set(needed) & set(options.programs):
            reason = f"without --programs {' or '.join(needed)}"
            command_line.refuse_without_effect(options, make_parser(), names, reason)


def make_parser() -> argparse.ArgumentParser:
    parser = command_line.base_parser(__doc__)
    parser.add_argument("--topology", required=True, help="such as v5e:2x4, v5e:16x16 or h100:8")
    parser.add_argument("--model", choices=SHAPES, default="bert-base")
    parser.add_argument(
        "--batch_size",
        type=command_line.positive_integer,
        required=True,
        help="rows over all devices together",
    )
    parser.add_argument("--sequence_length", type=command_line.positive_integer, default=128)
    parser.add_argument(
        "--programs",
        type=command_line.names_of(_PROGRAMS),
        default=["train", "loop"],
        help=f"programs to compile, comma-separated: {', '.join(_PROGRAMS)}",
    )
    command_line.add_dtype(parser, "bfloat16")
    parser.add_argument("--mesh_model", type=command_line.positive_integer, default=1)
    parser.add_argument("--shard_parameters", action="store_true")
    parser.add_argument("--rematerialize", action="store_true")
    parser.add_argument("--gradient_accumulation", type=command_line.positive_integer, default=1)
    parser.add_argument("--patience", type=command_line.positive_integer, default=3)
    parser.add_argument(
        "--chunk_tokens",
        type=command_line.positive_integer,
        default=planning.ACCELERATOR.chunk_tokens,
    )
    return parser


if __name__ == "__main__":
    command_line.run(main, make_parser())
