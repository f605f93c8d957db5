"""The compiled programs: each driver over a mesh, with the model's structure static.

The parameters are a plain dict: two models of one shape share their programs, and flattening a tree
of modules, which costs milliseconds, is not part of a call. `loop` and `pool` run under
`shard_map`: each device leaves on its own, with no collective inside the loop.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from pabee_jax.criteria import ExitCriterion
from pabee_jax.distributed.sharding import DATA
from pabee_jax.drivers import full, loop, pool
from pabee_jax.drivers.exit_rule import Exits
from pabee_jax.drivers.layer_loop import CONTROL, Control
from pabee_jax.models.parameters import Structure, merge

Parameters = Mapping[str, Any]


@functools.partial(jax.jit, static_argnums=0)
def run_full(graph: Structure, parameters: Parameters, batch):
    """Every exit's logits, (rows, exits, classes)."""
    return full.all_exit_logits(merge(graph, parameters), batch).swapaxes(0, 1)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=("chunk_size", "control"))
def run_early_exit(
    graph: Structure,
    mesh: Mesh,
    parameters: Parameters,
    batch,
    criterion: ExitCriterion,
    row,
    *,
    chunk_size: int | None = None,
    control: Control = CONTROL,
) -> Exits:
    """Driver `pool` in chunks of `chunk_size` rows per device, or `loop` without `chunk_size`."""

    def on_each_device(parameters, batch, criterion, row):
        model = merge(graph, parameters)
        if chunk_size is None:
            return loop.early_exit(model, batch, criterion, row, control=control)
        return pool.pooled_early_exit(
            model, batch, criterion, row, chunk_size=chunk_size, control=control
        )

    same, split = PartitionSpec(), PartitionSpec(DATA)
    return jax.shard_map(
        on_each_device, mesh=mesh, in_specs=(same, split, same, split), out_specs=split
    )(parameters, batch, criterion, row)
