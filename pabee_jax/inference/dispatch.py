"""Dispatches batches to the devices ahead of time and fetches their results in order."""

import collections
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from pabee_jax.data.batching import MODEL_INPUTS, assemble
from pabee_jax.data.dataset import Dataset
from pabee_jax.data.packing import packed
from pabee_jax.distributed import sharding

# Number of batches that are dispatched ahead of the batch whose result is fetched: enough that the
# devices do not wait for the host, few enough that the inputs do not fill the devices' memory.
_BATCHES_AHEAD = 4


class Job(NamedTuple):
    """One batch to run.

    Attributes:
        rows: (n,) index of each row in the call.
        batch: the arrays of the compiled shape by name; the devices split their first axis.
        row_of_place: the index in the call of each row of the compiled shape; 0 for padding rows.
        places: (n,) the place of each row in `row_of_place` and in the results.
        run: (batch on the devices, row indices on the devices) -> arrays with the row axis first.
    """

    rows: np.ndarray
    batch: dict[str, np.ndarray]
    row_of_place: np.ndarray
    places: np.ndarray
    run: Callable[[dict[str, jax.Array], jax.Array], Any]


def padded_job(rows: np.ndarray, part: Dataset, batch_size: int, mesh: Mesh, run) -> Job:
    """Return a job whose rows have one length and are padded to `batch_size` rows.

    Rows are assigned to the devices round-robin, so that a batch with padding rows gives every
    device the same share of rows.
    """
    devices = mesh.shape[sharding.DATA]
    size = -(-batch_size // devices) * devices
    round_robin = np.arange(size).reshape(-1, devices).T.ravel()
    values = assemble(part, np.arange(len(rows)), size, part.input_ids.shape[1])
    batch = {name: values[name][round_robin] for name in MODEL_INPUTS}
    places = np.argsort(round_robin)[: len(rows)]
    return Job(rows, batch, _row_of_place(rows, places, size), places, run)


def ragged_job(
    rows: np.ndarray, part: Dataset, max_rows: int, max_tokens: int, longest: int, mesh: Mesh, run
) -> Job:
    """Return a job whose rows have no padding.

    Every device has `max_rows` and `max_tokens`, and no row is longer than `longest`.
    """
    devices = mesh.shape[sharding.DATA]
    batch, places = packed(part, devices, max_rows, max_tokens, longest)
    row_of_place = _row_of_place(rows, places, devices * max_rows)
    return Job(rows, batch._asdict(), row_of_place, places, run)


def _row_of_place(rows: np.ndarray, places: np.ndarray, size: int) -> np.ndarray:
    row_of_place = np.zeros(size, np.int32)
    row_of_place[places] = rows
    return row_of_place


def run_jobs(jobs: Iterable[Job], mesh: Mesh) -> Iterator[tuple[np.ndarray, Any]]:
    """Run every job; yield (row indices, results on the host), in the order of the jobs.

    A few jobs are dispatched before the first result is fetched, so that the host prepares the next
    job (iterating `jobs` may tokenize its texts) while the devices work.
    """
    running = collections.deque()
    for job in jobs:
        batch = sharding.shard_batch(job.batch | {"row": job.row_of_place}, mesh)
        row = batch.pop("row")
        running.append((job.rows, job.places, job.run(batch, row)))
        if len(running) > _BATCHES_AHEAD:
            yield _fetch(*running.popleft())
    for dispatched in running:
        yield _fetch(*dispatched)


def _fetch(rows: np.ndarray, places: np.ndarray, result: Any) -> tuple[np.ndarray, Any]:
    return rows, jax.tree.map(lambda leaf: leaf[places], jax.device_get(result))
