"""The order of TPU devices in a mesh, which CPU devices do not have.

`sharding.mesh_of` follows the rings of the interconnect. For every device along the mesh axis
`data`, `BY_PROCESS` has the index of its process; recorded from libtpu 0.0.42.1 with jax 0.10.2.
v6e pods have the same order. `test_parallel.py` compares it with libtpu where libtpu is installed.
"""

import numpy as np
from jax.sharding import AxisType, Mesh

from pabee_jax.distributed import sharding
from pabee_jax.distributed.sharding import DATA, MODEL

BY_PROCESS = {
    "v5e:2x4": [0, 0, 0, 0, 1, 1, 1, 1],
    "v5e:4x4": [0, 0, 1, 1, 1, 1, 0, 2, 3, 3, 3, 3, 2, 2, 2, 0],
    "v5e:4x8": [0, 0, 2, 2, 4, 4, 6, 6] * 2 + [1, 1, 3, 3, 5, 5, 7, 7] * 2,
}
# The orders for small meshes, by their number of devices. Eight devices of four processes have the
# order of v5e:4x4, with the first and the last device of every process: 0, 1, 1, 2, 3, 3, 2, 0. The
# devices of two processes alternate.
SMALL = {8: (0, 2, 3, 4, 6, 7, 5, 1), 4: (0, 2, 1, 3)}


def permuted(mesh: Mesh) -> Mesh:
    """Return the mesh with its devices in an order of `SMALL`."""
    devices = sorted(mesh.devices.flat, key=lambda device: device.id)
    order = np.array(devices)[list(SMALL.get(len(devices), range(len(devices))))]
    return Mesh(order.reshape(mesh.devices.shape), mesh.axis_names, axis_types=mesh.axis_types)


def permute_meshes() -> None:
    """Give the meshes of this process the device order of a TPU pod."""
    mesh_of = sharding.mesh_of
    sharding.mesh_of = lambda devices, model: permuted(mesh_of(devices, model))


class StandInDevice:
    """A device as far as the assignment of rows to devices needs one."""

    platform = device_kind = "tpu"

    def __init__(self, index: int, process_index: int):
        self.id, self.process_index = index, process_index


def stand_in_mesh(by_process: list[int], model: int = 1) -> Mesh:
    """Return a mesh whose devices belong to the given processes; nothing can run on it."""
    devices = [StandInDevice(index, process) for index, process in enumerate(by_process)]
    shape = (len(devices) // model, model)
    return Mesh(np.array(devices).reshape(shape), (DATA, MODEL), axis_types=(AxisType.Auto,) * 2)
