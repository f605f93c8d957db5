"""The compiled programs: every driver over a mesh, with the model's structure static.

The parameters are a plain dict. Models of the same shape therefore share their programs, and a call
does not flatten a tree of modules, which would take milliseconds. `loop` and `pool` run under
`shard_map`, without collectives in the loop: each device stops when its own rows have exited.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from pabee_jax.criteria import ExitCriterion
from pabee_jax.distributed.sharding import DATA
from pabee_jax.drivers import full, loop, pool
from pabee_jax.drivers.exit_rule import Exits
from pabee_jax.drivers.layer_loop import CONTROL, Control
from pabee_jax.drivers.ragged import RaggedBatch
from pabee_jax.drivers.shapes import ChunkSizes
from pabee_jax.models.parameters import Structure, merge

Parameters = Mapping[str, Any]
_REPLICATED, _SHARDED = PartitionSpec(), PartitionSpec(DATA)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_full(structure: Structure, mesh: Mesh, parameters: Parameters, batch):
    """Return the logits of every exit, (rows, exits, classes), for rows padded to one length."""

    def on_each_device(parameters, batch):
        return full.all_exit_logits(merge(structure, parameters), batch).swapaxes(0, 1)

    return _over_devices(on_each_device, mesh, _REPLICATED, _SHARDED)(parameters, batch)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="sizes")
def run_full_pool(
    structure: Structure,
    mesh: Mesh,
    parameters: Parameters,
    batch: RaggedBatch,
    *,
    sizes: ChunkSizes,
):
    """Return the logits of every exit, (rows, exits, classes), for rows without padding."""

    def on_each_device(parameters, batch):
        model = merge(structure, parameters)
        return pool.pooled_all_exit_logits(model, batch, sizes=sizes).swapaxes(0, 1)

    return _over_devices(on_each_device, mesh, _REPLICATED, _SHARDED)(parameters, batch)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="control")
def run_loop(
    structure: Structure,
    mesh: Mesh,
    parameters: Parameters,
    batch,
    criterion: ExitCriterion,
    row,
    *,
    control: Control = CONTROL,
) -> Exits:
    """Run driver `loop` on each device."""

    def on_each_device(parameters, batch, criterion, row):
        model = merge(structure, parameters)
        return loop.early_exit(model, batch, criterion, row, control=control)

    specs = (_REPLICATED, _SHARDED, _REPLICATED, _SHARDED)
    return _over_devices(on_each_device, mesh, *specs)(parameters, batch, criterion, row)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=("sizes", "control"))
def run_pool(
    structure: Structure,
    mesh: Mesh,
    parameters: Parameters,
    batch: RaggedBatch,
    criterion: ExitCriterion,
    row,
    *,
    sizes: ChunkSizes,
    control: Control = CONTROL,
) -> Exits:
    """Run driver `pool` on each device; `batch` has the rows of each device, as `packed`."""

    def on_each_device(parameters, batch, criterion, row):
        return pool.pooled_early_exit(
            merge(structure, parameters),
            batch,
            criterion,
            row,
            sizes=sizes,
            control=control,
        )

    specs = (_REPLICATED, _SHARDED, _REPLICATED, _SHARDED)
    return _over_devices(on_each_device, mesh, *specs)(parameters, batch, criterion, row)


def _over_devices(function: Callable[..., Any], mesh: Mesh, *in_specs: PartitionSpec):
    """Return `function` on each device; the first axis of its results is sharded."""
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=_SHARDED)
