"""The device mesh and every sharding: one axis, `data`, over which batches are split."""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pabee_jax.errors import InputError

DATA = "data"


def make_mesh(data: int = -1) -> Mesh:
    """A mesh of `data` devices; -1 takes them all.

    Raises:
        InputError: there are not that many devices.
    """
    devices = jax.devices()
    count = len(devices) if data == -1 else data
    if not 1 <= count <= len(devices):
        raise InputError(f"mesh.data is {data}, but {len(devices)} devices are here (-1: all)")
    return jax.make_mesh((count,), (DATA,), (AxisType.Auto,), devices=devices[:count])


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises InputError when the batch cannot be split evenly over the mesh."""
    if batch_size % mesh.shape[DATA]:
        raise InputError(
            f"batch_size {batch_size} is not a multiple of the {mesh.shape[DATA]} devices of the "
            f"mesh axis {DATA!r}"
        )


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Splits every array's leading axis over the mesh."""
    return jax.device_put(dict(batch), NamedSharding(mesh, PartitionSpec(DATA)))


def replicate(tree, mesh: Mesh):
    """The same values on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
