"""Batches to the devices and results back, with the devices kept busy in between."""

import collections
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from pabee_jax.data.batching import MODEL_INPUTS, assemble
from pabee_jax.data.dataset import Dataset
from pabee_jax.distributed import sharding

# How many batches the devices may have in front of them: enough that they never wait for the host,
# few enough that the inputs do not fill their memory.
_BATCHES_AHEAD = 4


class Job(NamedTuple):
    """One batch to run.

    Attributes:
        rows: (n,) index of each row in the call.
        part: those rows, at the sequence length at which they run.
        batch_size: rows of the compiled shape, at least n.
        run: (batch on the devices, row indices on the devices) -> arrays with the row axis first.
    """

    rows: np.ndarray
    part: Dataset
    batch_size: int
    run: Callable[[dict[str, jax.Array], jax.Array], Any]


def results(jobs: Iterable[Job], mesh: Mesh) -> Iterator[tuple[np.ndarray, Any]]:
    """Runs every job; yields (row indices, their results on the host) in the order of the jobs.

    A few jobs are dispatched before the first result is waited for, so that the host prepares the
    next one (tokenises it, if `jobs` does that) while the devices work.
    """
    running = collections.deque()
    for job in jobs:
        batch, row, place = _on_devices(job, mesh)
        running.append((job.rows, place, job.run(batch, row)))
        if len(running) > _BATCHES_AHEAD:
            yield _on_host(*running.popleft())
    for result in running:
        yield _on_host(*result)


def _on_devices(job: Job, mesh: Mesh):
    """The batch, the index of each of its rows in the call, and where in the batch each row is.

    Rows are dealt out to the devices in turn, so that each has its share of a batch that is not
    full.
    """
    devices = mesh.shape[sharding.DATA]
    size = -(-job.batch_size // devices) * devices
    dealt = np.arange(size).reshape(-1, devices).T.ravel()
    count = len(job.rows)
    values = assemble(job.part, np.arange(count), size, job.part.input_ids.shape[1])
    batch = {name: values[name] for name in MODEL_INPUTS}
    batch["row"] = np.pad(job.rows.astype(np.int32), (0, size - count))
    batch = {name: each[dealt] for name, each in batch.items()}
    batch = sharding.shard_batch(batch, mesh)
    return batch, batch.pop("row"), np.argsort(dealt)[:count]


def _on_host(rows: np.ndarray, place: np.ndarray, result: Any) -> tuple[np.ndarray, Any]:
    return rows, jax.tree.map(lambda leaf: leaf[place], jax.device_get(result))
