"""The compiled programs: every driver over a mesh, with the model's structure static.

The parameters are a plain dict. Models of the same shape therefore share their programs, and a call
does not flatten a tree of modules, which would take milliseconds. `loop` and `pool` run under
`shard_map`, without collectives in the loop: each device stops when its own rows have exited.
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
def run_full(structure: Structure, parameters: Parameters, batch):
    """Return the logits of every exit, (rows, exits, classes)."""
    return full.all_exit_logits(merge(structure, parameters), batch).swapaxes(0, 1)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=("chunk_size", "control"))
def run_early_exit(
    structure: Structure,
    mesh: Mesh,
    parameters: Parameters,
    batch,
    criterion: ExitCriterion,
    row,
    *,
    chunk_size: int | None = None,
    control: Control = CONTROL,
) -> Exits:
    """Run driver `pool` in chunks of `chunk_size` rows per device; without `chunk_size`, `loop`."""

    def on_each_device(parameters, batch, criterion, row):
        model = merge(structure, parameters)
        if chunk_size is None:
            return loop.early_exit(model, batch, criterion, row, control=control)
        return pool.pooled_early_exit(
            model, batch, criterion, row, chunk_size=chunk_size, control=control
        )

    replicated, sharded = PartitionSpec(), PartitionSpec(DATA)
    return jax.shard_map(
        on_each_device,
        mesh=mesh,
        in_specs=(replicated, sharded, replicated, sharded),
        out_specs=sharded,
    )(parameters, batch, criterion, row)
