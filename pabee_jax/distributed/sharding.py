"""The device mesh and every sharding: rules from what a parameter is to the axes of the mesh.

The mesh has two axes. A batch's rows are split over `data`; attention heads, feed-forward features
and embedding features over `model`. The program is the same for any number of devices and
processes: XLA adds the communication (GSPMD).
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pabee_jax.errors import InputError
from pabee_jax.models.config import ModelConfig

DATA, MODEL = "data", "model"

# What the last dimensions of a parameter are, by its name. Those before them (groups, exits) and
# parameters without a rule are whole on every device.
_DIMENSIONS = (
    (r"\.(query|key|value)_projection\.kernel$", ("hidden", "heads")),
    (r"\.(query|key|value)_projection\.bias$", ("heads",)),
    (r"\.attention_output\.kernel$", ("heads", "hidden")),
    (r"\.intermediate\.kernel$", ("hidden", "feed_forward")),
    (r"\.intermediate\.bias$", ("feed_forward",)),
    (r"\.output\.kernel$", ("feed_forward", "hidden")),
    (r"^embeddings\.\w+\.embedding$", ("rows", "embedding")),
    (r"^embeddings\.projection\.kernel$", ("embedding", "hidden")),
    (r"^pooler\.kernel$", ("hidden", "features")),
)
# Over which axis a dimension is split; "hidden" only with `shard_parameters`.
_AXES = {"heads": MODEL, "feed_forward": MODEL, "embedding": MODEL, "hidden": DATA}


def make_mesh(data: int = -1, model: int = 1) -> Mesh:
    """A mesh of `data` x `model` devices; data = -1 takes all that there are.

    Raises:
        InputError: there are not that many devices, or `model` does not divide them; some devices
            would be left out of a run of several processes.
    """
    devices = jax.devices()
    if model < 1 or len(devices) % model:
        raise InputError(
            f"mesh.model is {model}, which does not divide the {len(devices)} devices that are here"
        )
    count = len(devices) // model if data == -1 else data
    if not 1 <= count * model <= len(devices):
        also = f" and mesh.model {model}" if model > 1 else ""
        raise InputError(
            f"mesh.data is {data}{also}, but {len(devices)} devices are here (-1: all)"
        )
    if jax.process_count() > 1 and count * model < len(devices):
        raise InputError(
            f"the mesh has {count * model} devices, but the {jax.process_count()} processes have "
            f"{len(devices)}: use all of them (mesh.data=-1)"
        )
    shape, axes = (count, model), (DATA, MODEL)
    return jax.make_mesh(shape, axes, (AxisType.Auto,) * 2, devices=devices[: count * model])


def check_batch_size(batch_size: int, accumulation: int, mesh: Mesh) -> None:
    """Raises InputError when the batch cannot be split evenly over the mesh and microbatches."""
    shards = mesh.shape[DATA]
    if batch_size % (shards * accumulation):
        times = f" times the gradient_accumulation of {accumulation}" if accumulation > 1 else ""
        raise InputError(
            f"batch_size {batch_size} is not a multiple of the {shards} devices of the mesh axis "
            f"{DATA!r}{times}"
        )


def check_model(config: ModelConfig, mesh: Mesh, *, shard_parameters: bool) -> None:
    """Raises InputError for a size of the model that its mesh axis does not divide."""
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
    """Where the parts of a parameter, or of its moments in the optimiser, are.

    `shard_parameters` also splits matrices over the data axis; a layer's are gathered when it runs.
    """
    axes = _AXES if shard_parameters else {**_AXES, "hidden": None}
    for pattern, dimensions in _DIMENSIONS:
        if re.search(pattern, name):
            ends = [axes.get(dimension) for dimension in dimensions]
            return NamedSharding(mesh, PartitionSpec(*[None] * (ndim - len(ends)), *ends))
    return NamedSharding(mesh, PartitionSpec())


def shardings(tree: Any, mesh: Mesh, *, shard_parameters: bool = False) -> Any:
    """A sharding for every array of a tree whose dictionaries go by parameter name."""

    def of(path, leaf):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        name = names[-1] if names else ""
        return parameter_sharding(name, np.ndim(leaf), mesh, shard_parameters=shard_parameters)

    return jax.tree_util.tree_map_with_path(of, tree)


def put(tree: Any, where: Any) -> Any:
    """The same host values in every process, as global arrays with these shardings."""

    def one(value, sharding):
        value = np.asarray(value)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(one, tree, where)


def process_rows(batch_size: int, mesh: Mesh) -> slice:
    """Which rows of a batch are this process's to read: all of them in a run of one process."""
    sharding = NamedSharding(mesh, PartitionSpec(DATA))
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    parts = [index[0].indices(batch_size) for index in indices if index]
    return slice(min(start for start, _, _ in parts), max(stop for _, stop, _ in parts))


def shard_batch(
    batch: Mapping[str, np.ndarray], mesh: Mesh, batch_size: int | None = None
) -> dict[str, jax.Array]:
    """Splits every array's leading axis over the mesh.

    In a run of several processes each gives its own rows (`process_rows`) of `batch_size`.
    """
    sharding = NamedSharding(mesh, PartitionSpec(DATA))
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), sharding)

    def one(part):
        shape = (batch_size or len(part), *part.shape[1:])
        return jax.make_array_from_process_local_data(sharding, part, shape)

    return {name: one(part) for name, part in batch.items()}


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree, mesh: Mesh):
    """The same values on every device of the mesh."""
    return jax.device_put(tree, replicated(mesh))
