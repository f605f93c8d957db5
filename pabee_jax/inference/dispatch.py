"""Dispatches batches to the devices ahead of time and fetches their results in order."""

import collections
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from pabee_jax.data.batching import MODEL_INPUTS, assemble
from pabee_jax.data.dataset import Dataset
from pabee_jax.distributed import sharding

# Number of batches that are dispatched ahead of the batch whose result is fetched: enough that the
# devices do not wait for the host, few enough that the inputs do not fill the devices' memory.
_BATCHES_AHEAD = 4


class Job(NamedTuple):
    """One batch to run.

    Attributes:
        rows: (n,) index of each row in the call.
        part: the tokens of these rows, at the sequence length of the compiled shape.
        batch_size: number of rows of the compiled shape, at least n.
        run: (batch on the devices, row indices on the devices) -> arrays with the row axis first.
    """

    rows: np.ndarray
    part: Dataset
    batch_size: int
    run: Callable[[dict[str, jax.Array], jax.Array], Any]


def run_jobs(jobs: Iterable[Job], mesh: Mesh) -> Iterator[tuple[np.ndarray, Any]]:
    """Run every job; yield (row indices, results on the host), in the order of the jobs.

    A few jobs are dispatched before the first result is fetched, so that the host prepares the next
    job (iterating `jobs` may tokenize its texts) while the devices work.
    """
    running = collections.deque()
    for job in jobs:
        batch, row, positions = _put_batch(job, mesh)
        running.append((job.rows, positions, job.run(batch, row)))
        if len(running) > _BATCHES_AHEAD:
            yield _fetch(*running.popleft())
    for dispatched in running:
        yield _fetch(*dispatched)


def _put_batch(job: Job, mesh: Mesh):
    """Pad the rows of `job` to its batch size and shard them over the devices.

    Rows are assigned to the devices round-robin, so that a batch with padding rows gives every
    device the same share of rows.

    Returns:
        The batch, the index in the call of each row of the batch, and the position in the batch of
        each row of the job.
    """
    devices = mesh.shape[sharding.DATA]
    size = -(-job.batch_size // devices) * devices
    round_robin = np.arange(size).reshape(-1, devices).T.ravel()
    num_rows = len(job.rows)
    values = assemble(job.part, np.arange(num_rows), size, job.part.input_ids.shape[1])
    batch = {name: values[name] for name in MODEL_INPUTS}
    batch["row"] = np.pad(job.rows.astype(np.int32), (0, size - num_rows))
    batch = {name: array[round_robin] for name, array in batch.items()}
    batch = sharding.shard_batch(batch, mesh)
    return batch, batch.pop("row"), np.argsort(round_robin)[:num_rows]


def _fetch(rows: np.ndarray, positions: np.ndarray, result: Any) -> tuple[np.ndarray, Any]:
    return rows, jax.tree.map(lambda leaf: leaf[positions], jax.device_get(result))
