"""Divides the rows of a call into jobs, whose shapes bound the number of compiled programs."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from pabee_jax.data.batching import batches_by_bucket, bucket_of, inference_buckets
from pabee_jax.data.dataset import Dataset
from pabee_jax.data.packing import blocks_that_fit
from pabee_jax.drivers.shapes import next_power_of_two, previous_power_of_two, sequence_lengths
from pabee_jax.inference.dispatch import Job, padded_job, ragged_job
from pabee_jax.inference.planning import DEFAULT_BATCH_SIZE, PoolPlan, loop_rows
from pabee_jax.inference.row_source import RowSource


class Programs(NamedTuple):
    """How a driver runs a batch; the batch and the row indices are on the devices.

    Attributes:
        padded: (batch, row indices) -> results, for rows that are padded to one length.
        ragged: (plan, batch, row indices) -> results, for rows without padding.
    """

    padded: Callable[[dict[str, Any], Any], Any]
    ragged: Callable[[PoolPlan, dict[str, Any], Any], Any]


def padded_jobs(
    programs: Programs,
    mesh: Mesh,
    blocks: Iterable[Dataset],
    limit: int,
    max_rows: int,
) -> Iterator[Job]:
    """Yield jobs whose rows have about the same length and are padded to one length.

    Args:
        programs: how a batch runs.
        mesh: devices over which a batch is sharded.
        blocks: consecutive parts of the input.
        limit: the most tokens of a row.
        max_rows: the most rows of a job.
    """
    for rows, part in batches_by_bucket(blocks, max_rows, inference_buckets(limit)):
        length = bucket_of(int(part.lengths.max()), _lengths(mesh, len(rows), limit))
        yield _padded_job(programs, mesh, rows, part.resized(length))


def pool_jobs(
    programs: Programs,
    mesh: Mesh,
    source: RowSource,
    plans: tuple[PoolPlan, PoolPlan],
    batch_size: int | None,
    pads_few_rows: bool,
) -> Iterator[Job]:
    """Yield jobs of as many rows as fit into a pool.

    Args:
        programs: how a batch runs.
        mesh: devices over which the rows are sharded.
        source: the rows.
        plans: the small and the large pool.
        batch_size: the most rows of a job.
        pads_few_rows: pad the rows of a job if it has few.
    """
    small, large = plans
    max_rows = min(batch_size or large.rows, large.rows)
    for rows, part in blocks_that_fit(source.blocks, max_rows, large.tokens):
        if pads_few_rows and len(rows) <= loop_rows(mesh):
            for job in padded_jobs(programs, mesh, [part], source.limit, loop_rows(mesh)):
                yield job._replace(rows=rows[job.rows], row_of_place=rows[job.row_of_place])
            continue
        fits = len(rows) <= small.rows and part.lengths.sum() <= small.tokens
        yield _ragged_job(programs, mesh, rows, part, small if fits else large)


def every_job(
    driver: str,
    programs: Programs,
    mesh: Mesh,
    limit: int,
    plans: tuple[PoolPlan, ...],
    batch_size: int | None,
    lengths: Sequence[int] | None,
) -> list[Job]:
    """Return one job without texts for every compiled shape that a driver uses.

    Args:
        driver: the driver.
        programs: how a batch runs.
        mesh: devices over which the rows are sharded.
        limit: the most tokens of a row.
        plans: the pools; none for the driver "loop".
        batch_size: the most rows that run together; None for the driver's default.
        lengths: numbers of tokens of the rows; None for all.
    """
    if driver == "loop":
        sizes = _powers_of_two(rows_of_loop(batch_size))
    elif driver == "pool":
        sizes = []
    else:
        few = loop_rows(mesh)
        sizes = _powers_of_two(next_power_of_two(min(batch_size or few, few)))
    jobs = []
    for rows in sizes:
        buckets = _lengths(mesh, rows, limit)
        needed = buckets if lengths is None else {bucket_of(n, buckets) for n in lengths}
        for length in sorted(needed):
            no_texts = Dataset(*[np.zeros((rows, length), np.int32)] * 3)
            jobs.append(_padded_job(programs, mesh, np.arange(rows), no_texts))
    if driver == "pool" or batch_size is None or batch_size > loop_rows(mesh):
        no_rows = Dataset(*[np.zeros((0, 1), np.int32)] * 3)
        jobs += [_ragged_job(programs, mesh, np.arange(0), no_rows, plan) for plan in plans]
    return jobs


def rows_of_loop(batch_size: int | None) -> int:
    """Return the most rows of a job of the driver "loop": a power of two."""
    return previous_power_of_two(batch_size or DEFAULT_BATCH_SIZE)


def _powers_of_two(highest: int) -> list[int]:
    return [2**n for n in range(highest.bit_length())]


def _lengths(mesh: Mesh, rows: int, limit: int) -> tuple[int, ...]:
    """Return the sequence lengths to which a batch of `rows` rows may be padded."""
    return sequence_lengths(limit) if rows <= loop_rows(mesh) else inference_buckets(limit)


def _padded_job(programs: Programs, mesh: Mesh, rows: np.ndarray, part: Dataset) -> Job:
    # The number of rows is a power of two, so that the number of programs that a process compiles
    # is bounded: after about 90 programs of 12 layers, a process has as many memory maps as Linux
    # allows.
    return padded_job(rows, part, next_power_of_two(len(rows)), mesh, programs.padded)


def _ragged_job(
    programs: Programs, mesh: Mesh, rows: np.ndarray, part: Dataset, plan: PoolPlan
) -> Job:
    def run(batch, row):
        return programs.ragged(plan, batch, row)

    sizes = plan.rows_per_device, plan.tokens_per_device, plan.sizes.longest
    return ragged_job(rows, part, *sizes, mesh, run)
