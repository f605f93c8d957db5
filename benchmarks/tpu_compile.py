"""Compiles for a TPU pod without a TPU: will it fit, and what will it spend on communication?

    pip install --no-deps libtpu==0.0.42.1   # the one that goes with your jax
    python -m benchmarks.tpu_compile --topology v5e:16x16 --model bert-large --batch 8192

The programs are the real ones: the training step, and the drivers `loop` and `pool`. For each, per
device: memory, floating-point operations, bytes read and written, and every collective with its
size.
"""

import argparse
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Before jax is imported: the compiler must not look for a TPU, and this process needs none.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks import command_line
from benchmarks.models import SHAPES
from pabee_jax.criteria import Patience, as_arrays
from pabee_jax.distributed import sharding
from pabee_jax.errors import InputError
from pabee_jax.inference import planning
from pabee_jax.inference.programs import run_early_exit
from pabee_jax.models.config import ModelConfig
from pabee_jax.models.encoder import EarlyExitModel
from pabee_jax.models.parameters import in_compute_dtype, split, stacked
from pabee_jax.training.config import TrainConfig, check
from pabee_jax.training.step import initial_state, make_train_step
from pabee_jax.training.strategy import phase_of

_STEPS = 1_000_000
# GiB per chip, from the vendor's data sheets.
_MEMORY = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
_BITS = {"pred": 8, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32}
_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf"= (?P<shape>\S.*?) (?P<kind>{'|'.join(_KINDS)})(?:-start)?\(")
_ARRAY = re.compile(rf"({'|'.join(_BITS)})\[([\d,]*)\]")
_PROGRAMS = ("train", "loop", "pool")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_WHILE_BODY = re.compile(r"\bwhile\(.*body=%?([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=\{?(%?[\w.\-, %]+)")


class Collective(NamedTuple):
    """Attributes:
    kind: such as "all-reduce".
    bytes: of its result, per device.
    in_loop: whether it is inside a loop, and so runs several times.
    """

    kind: str
    bytes: int
    in_loop: bool


def collectives(text: str) -> list[Collective]:
    """Every collective of a compiled program, largest first."""
    found, inside = [], _computations_in_loops(text)
    for computation, line in _lines(text):
        if match := _COLLECTIVE.search(line):
            size = sum(
                _BITS[kind] // 8 * int(np.prod([int(n) for n in dims.split(",") if n]))
                for kind, dims in _ARRAY.findall(match["shape"])
            )
            found.append(Collective(match["kind"], size, computation in inside))
    return sorted(found, key=lambda one: -one.bytes)


def _lines(text: str) -> Iterator[tuple[str, str]]:
    computation = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            computation = match[1]
        yield computation, line


def _computations_in_loops(text: str) -> set[str]:
    """The bodies of loops, and what they call."""
    calls: dict[str, set[str]] = {}
    bodies = set()
    for computation, line in _lines(text):
        bodies |= set(_WHILE_BODY.findall(line))
        for names in _CALLED.findall(line):
            called = {name.strip().lstrip("%") for name in names.split(",")}
            calls.setdefault(computation, set()).update(called)
    inside, new = set(), bodies
    while new:
        inside |= new
        new = set().union(*(calls.get(name, set()) for name in new)) - inside
    return inside


def pod_mesh(topology: str, model: int) -> Mesh:
    """The training mesh over the devices of a pod that is not here.

    Raises:
        InputError: no libtpu, an unknown topology, or one that `model` does not divide.
    """
    try:
        pod = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"--topology {topology}: {reason} (it needs the libtpu that goes with this jax, and a "
            "name such as v5e:2x4)"
        ) from error
    count = len(pod.devices)
    if count % model:
        raise InputError(f"--mesh_model {model} does not divide the {count} chips of {topology}")
    devices = np.array(pod.devices).reshape(-1, model)
    return Mesh(devices, (sharding.DATA, sharding.MODEL), axis_types=(AxisType.Auto,) * 2)


def programs(values, mesh: Mesh) -> Iterator[tuple[str, Any]]:
    """Name and lowered program of each that is asked for."""
    rows, length = values.batch, values.sequence_length
    config = ModelConfig.from_hugging_face(SHAPES[values.model], 2)
    sharding.check_model(config, mesh, shard_parameters=values.shard_parameters)
    sharding.check_batch_size(rows, values.gradient_accumulation, mesh)
    model = jax.eval_shape(lambda: _model(config, values.dtype))
    on_rows = NamedSharding(mesh, PartitionSpec(sharding.DATA))

    def abstract(shape, dtype, sharding=on_rows):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    inputs = ("input_ids", "attention_mask", "token_type_ids")
    batch = {name: abstract((rows, length), jnp.int32) for name in inputs}
    if "train" in values.programs:
        yield "training step", _training_step(values, config, model, mesh, batch, abstract)
    graph, parameters = split(jax.eval_shape(in_compute_dtype, model))
    whole = sharding.replicated(mesh)
    parameters = {name: abstract(one.shape, one.dtype, whole) for name, one in parameters.items()}
    criterion = jax.tree.map(
        lambda leaf: abstract(leaf.shape, leaf.dtype, whole), as_arrays(Patience(values.patience))
    )
    row = abstract((rows,), jnp.int32)
    per_device = rows // mesh.shape[sharding.DATA]
    chunk = min(per_device, max(1, values.chunk_tokens // length))
    for name, chunk_size in (("loop", None), ("pool", chunk)):
        if name in values.programs:
            lowered = run_early_exit.trace(
                graph, mesh, parameters, batch, criterion, row, chunk_size=chunk_size
            ).lower(lowering_platforms=("tpu",))
            yield f"driver {name}", lowered


def _training_step(values, config: ModelConfig, model, mesh: Mesh, batch, abstract):
    settings = TrainConfig(
        dtype=values.dtype,
        rematerialize=values.rematerialize,
        gradient_accumulation=values.gradient_accumulation,
    )
    check(settings)
    graph, parameters = split(jax.eval_shape(stacked, model))
    state = jax.eval_shape(lambda parameters: initial_state(parameters, settings), parameters)
    where = sharding.shardings(state, mesh, shard_parameters=values.shard_parameters)
    state = jax.tree.map(lambda one, place: abstract(one.shape, one.dtype, place), state, where)
    rows = values.batch
    labels = {"labels": abstract((rows,), jnp.int32), "valid": abstract((rows,), bool)}
    step = make_train_step(graph, settings, _STEPS, where)
    phase = phase_of(settings, 0, _STEPS, config.num_hidden_layers)
    return step.func.trace(state, batch | labels, phase, **step.keywords).lower(
        lowering_platforms=("tpu",)
    )


def _model(config: ModelConfig, dtype: str) -> EarlyExitModel:
    return EarlyExitModel(config, dtype=dtype, rngs=nnx.Rngs(0))


def report(name: str, lowered, memory_gib: float | None) -> dict[str, Any]:
    """Compiles and prints; returns the same as a record.

    The compiler counts the body of a loop once, however often it runs.
    """
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).strip().split("\n")[0]
        print(f"\n{name}: does not fit: {reason}")
        return {"program": name, "fits": False, "reason": reason}
    took, memory, cost = time.perf_counter() - start, compiled.memory_analysis(), _cost(compiled)
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = (kept + memory.temp_size_in_bytes) / 2**30
    found = collectives(compiled.as_text())
    record = {
        "program": name,
        "fits": memory_gib is None or total <= memory_gib,
        "gib": total,
        "arguments_gib": memory.argument_size_in_bytes / 2**30,
        "temporary_gib": memory.temp_size_in_bytes / 2**30,
        "gflops": cost.get("flops", 0.0) / 1e9,
        "gbytes": cost.get("bytes accessed", 0.0) / 1e9,
        "compile_s": took,
        "collectives": [one._asdict() for one in found],
    }
    chip = "" if memory_gib is None else f" of {memory_gib} GiB"
    print(f"\n{name}: compiled in {took:.0f} s; per device:")
    print(
        f"  memory {total:.2f}{chip} (arguments {record['arguments_gib']:.2f}, temporary "
        f"{record['temporary_gib']:.2f}): {'fits' if record['fits'] else 'DOES NOT FIT'}"
    )
    print(
        f"  {record['gflops']:.4g} GFLOP, {record['gbytes']:.4g} GB of memory traffic "
        "(a loop's body counts once)"
    )
    _print_collectives(found)
    return record


def _print_collectives(found: list[Collective]) -> None:
    if not found:
        print("  no collective")
    for one, count in sorted(Counter(found).items(), key=lambda item: -item[0].bytes):
        where = ", inside a loop" if one.in_loop else ""
        print(f"  {count} x {one.kind} of {one.bytes / 2**20:.4g} MiB{where}")


def _cost(compiled) -> dict[str, float]:
    cost = compiled.cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost) or {}


def main(values) -> None:
    mesh = pod_mesh(values.topology, values.mesh_model)
    generation = values.topology.partition(":")[0]
    shape = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    rows = values.batch // mesh.shape[sharding.DATA]
    print(
        f"{values.model} on {values.topology} ({mesh.size} chips, {shape}), {values.dtype}, "
        f"{values.batch} rows of {values.sequence_length} tokens: {rows} per data shard"
    )
    memory = _MEMORY.get(generation)
    records = [report(name, lowered, memory) for name, lowered in programs(values, mesh)]
    name = f"tpu_compile-{values.model}-{values.topology.replace(':', '-')}"
    command_line.save(values.output, name, values, records, picture=False)
    if not all(record["fits"] for record in records):
        raise InputError(
            "it does not fit: try --rematerialize, --gradient_accumulation 2, --shard_parameters, "
            "--mesh_model 2, or a smaller --batch"
        )


def _arguments() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--topology", required=True, help="such as v5e:2x4 or v5e:16x16")
    result.add_argument("--model", choices=SHAPES, default="bert-base")
    result.add_argument("--batch", type=command_line.positive_integer, required=True)
    result.add_argument("--sequence_length", type=command_line.positive_integer, default=128)
    programs = command_line.names_of(_PROGRAMS)
    result.add_argument("--programs", type=programs, default=["train", "loop"])
    result.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    result.add_argument("--mesh_model", type=command_line.positive_integer, default=1)
    result.add_argument("--shard_parameters", action="store_true")
    result.add_argument("--rematerialize", action="store_true")
    result.add_argument("--gradient_accumulation", type=command_line.positive_integer, default=1)
    result.add_argument("--patience", type=command_line.positive_integer, default=3)
    result.add_argument(
        "--chunk_tokens",
        type=command_line.positive_integer,
        default=planning.ACCELERATOR.chunk_tokens,
    )
    result.add_argument("--output", type=Path, default=Path("benchmark_results"))
    return result


if __name__ == "__main__":
    command_line.run(main, _arguments())
