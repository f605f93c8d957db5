"""The device mesh and all shardings: rules that map the dimensions of parameters to mesh axes.

The mesh has two axes. The rows of a batch are sharded over `data`. Attention heads, feed-forward
features and embedding features are sharded over `model`. The program is the same for any number of
devices and processes: XLA adds the communication (GSPMD).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from pabee_jax.errors import InputError
from pabee_jax.models.config import ModelConfig

DATA, MODEL = "data", "model"

# The names of a parameter's last dimensions, by a pattern of its name. The dimensions before them
# (groups, exits) and parameters without a rule are replicated.
_DIMENSIONS = (
    (r"\.(query|key|value)_projection\.kernel$", ("hidden", "heads")),
    (r"\.(query|key|value)_projection\.bias$", ("heads",)),
    (r"\.attention_output\.kernel$", ("heads", "hidden")),
    (r"\.(intermediate|gate)\.kernel$", ("hidden", "feed_forward")),
    (r"\.intermediate\.bias$", ("feed_forward",)),
    (r"\.output\.kernel$", ("feed_forward", "hidden")),
    (r"^embeddings\.\w+\.embedding$", ("rows", "embedding")),
    (r"^embeddings\.projection\.kernel$", ("embedding", "hidden")),
    (r"^pooler\.kernel$", ("hidden", "features")),
)
# The mesh axis over which a dimension is sharded; "hidden" is sharded only with `shard_parameters`.
_AXES = {"heads": MODEL, "feed_forward": MODEL, "embedding": MODEL, "hidden": DATA}


def make_mesh(data: int = -1, model: int = 1) -> Mesh:
    """Return a mesh of `data` x `model` devices; with data = -1, a mesh of all devices.

    Raises:
        InputError: `model` does not divide the number of devices, there are fewer than
            `data` x `model` devices, or the mesh of a run with several processes does not use all
            devices.
    """
    devices = jax.devices()
    if model < 1 or len(devices) % model:
        raise InputError(f"mesh.model is {model}, which does not divide the {len(devices)} devices")
    count = len(devices) // model if data == -1 else data
    if not 1 <= count * model <= len(devices):
        model_axis = f" and mesh.model is {model}" if model > 1 else ""
        raise InputError(
            f"mesh.data is {data}{model_axis}, but there are {len(devices)} devices; mesh.data=-1 "
            "uses all of them"
        )
    if jax.process_count() > 1 and count * model < len(devices):
        raise InputError(
            f"the mesh has {count * model} devices, but the {jax.process_count()} processes have "
            f"{len(devices)}; set mesh.data=-1 to use all of them"
        )
    return mesh_of(devices[: count * model], model)


def first_device() -> Mesh:
    """Return the mesh of this process's first device."""
    return mesh_of(jax.local_devices()[:1], 1)


def mesh_of(devices: Sequence[Any], model: int) -> Mesh:
    """Return the mesh over all of these devices, with `model` of them along the axis `model`.

    On TPUs, JAX orders the devices along the rings of the interconnect. In this order, the devices
    of one process are usually not next to each other.

    Raises:
        InputError: the TPU devices are no box of the interconnect.
    """
    shape = (len(devices) // model, model)
    try:
        # Not `jax.make_mesh`, which splits no axis of a TPU pod except on v5e: it refuses a model
        # axis of 2 on v6e:4x4.
        order = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except AssertionError:  # JAX's only check of the devices' coordinates.
        raise InputError(
            f"the mesh has {len(devices)} devices, which form no box of the TPU interconnect; set "
            "mesh.data=-1 to use all devices"
        ) from None
    return Mesh(order, (DATA, MODEL), axis_types=(AxisType.Auto,) * 2)


def check_batch_size(batch_size: int, accumulation: int, mesh: Mesh) -> None:
    """Raise InputError if the batch cannot be split evenly over the mesh and the microbatches."""
    shards = mesh.shape[DATA]
    if batch_size % (shards * accumulation):
        times = f" times the gradient_accumulation of {accumulation}" if accumulation > 1 else ""
        raise InputError(
            f"batch_size {batch_size} is not a multiple of the {shards} devices of the mesh axis "
            f"{DATA!r}{times}"
        )


def check_model(config: ModelConfig, mesh: Mesh, *, shard_parameters: bool) -> None:
    """Raise InputError if a mesh axis does not divide a model size that is sharded over it."""
    sizes = [
        ("attention heads", config.num_attention_heads, MODEL),
        ("feed-forward features", config.intermediate_size, MODEL),
        ("embedding features", config.embedding_size, MODEL),
    ]
    if shard_parameters:
        sizes.append(("hidden features", config.hidden_size, DATA))
    for name, size, axis in sizes:
        if size % mesh.shape[axis]:
            raise InputError(
                f"the model's {size} {name} cannot be split over the {mesh.shape[axis]} devices of "
                f"the mesh axis {axis!r}"
            )


def parameter_sharding(
    name: str, ndim: int, mesh: Mesh, *, shard_parameters: bool
) -> NamedSharding:
    """Return the sharding of a parameter, which its optimizer moments share.

    `shard_parameters` also shards matrices over the data axis; XLA gathers the matrices of a layer
    when the layer runs.
    """
    axes = _AXES if shard_parameters else {**_AXES, "hidden": None}
    for pattern, dimensions in _DIMENSIONS:
        if re.search(pattern, name):
            last_axes = [axes.get(dimension) for dimension in dimensions]
            leading = [None] * (ndim - len(last_axes))
            return NamedSharding(mesh, PartitionSpec(*leading, *last_axes))
    return NamedSharding(mesh, PartitionSpec())


def shardings(tree: Any, mesh: Mesh, *, shard_parameters: bool = False) -> Any:
    """Return a sharding for every array of a tree, such as the training state.

    The name of a parameter is the last dictionary key on the path to its array.
    """

    def leaf_sharding(path, leaf):
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        name = names[-1] if names else ""
        return parameter_sharding(name, np.ndim(leaf), mesh, shard_parameters=shard_parameters)

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def put(tree: Any, where: Any) -> Any:
    """Return host values as global arrays with the shardings of the tree `where`.

    All processes must pass the same values.
    """

    def global_array(value, sharding):
        value = np.asarray(value)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(global_array, tree, where)


def process_rows(
    batch_size: int, mesh: Mesh, process: int | None = None
) -> Int[np.ndarray, " rows"]:
    """Return the rows of a batch that the devices of one process hold, in ascending order.

    The rows of a process need not be contiguous: they depend on the order of the devices in the
    mesh.

    Args:
        batch_size: rows of the whole batch.
        mesh: over whose axis `data` the rows are sharded.
        process: index of the process; absent, this process.
    """
    process = jax.process_index() if process is None else process
    indices = NamedSharding(mesh, PartitionSpec(DATA)).devices_indices_map((batch_size,))
    held = np.zeros(batch_size, bool)
    for device, (rows, *_) in indices.items():
        if device.process_index == process:
            held[rows] = True
    return np.flatnonzero(held)


def shard_batch(
    batch: Mapping[str, np.ndarray], mesh: Mesh, batch_size: int | None = None
) -> dict[str, jax.Array]:
    """Return the batch with the leading axis of every array sharded over the mesh axis `data`.

    Args:
        batch: the rows `process_rows(batch_size, mesh)` of the whole batch, in this order; if all
            devices of the mesh belong to this process, these are all rows.
        mesh: the mesh.
        batch_size: rows of the whole batch; absent, the rows of `batch`.
    """
    sharding = NamedSharding(mesh, PartitionSpec(DATA))
    if not mesh.is_multi_process:
        return jax.device_put(dict(batch), sharding)
    if batch_size is None:
        raise ValueError("batch_size is needed in a run of several processes")
    first_local_row = np.searchsorted(process_rows(batch_size, mesh), np.arange(batch_size))

    def global_array(local_rows):
        def shard(index):
            start, stop, _ = index[0].indices(batch_size)
            first = first_local_row[start]
            return local_rows[first : first + stop - start]

        shape = (batch_size, *local_rows.shape[1:])
        return jax.make_array_from_callback(shape, sharding, shard)

    return {name: global_array(local_rows) for name, local_rows in batch.items()}


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that replicates an array over the mesh."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree, mesh: Mesh):
    """Return the arrays of a tree replicated over the mesh."""
    return jax.device_put(tree, replicated(mesh))
