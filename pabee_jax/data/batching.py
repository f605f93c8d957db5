"""Batches of static shapes, for training and for inference.

A training batch is a pure function of the dataset, the batch size, the seed and the step.
"""

import concurrent.futures
import functools
import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from pabee_jax.data.dataset import Dataset
from pabee_jax.drivers.shapes import sequence_lengths

Block = TypeVar("Block")
# Number of batches that are sorted by length together. More batches give less padding; fewer
# batches give more random combinations of rows.
_GROUPED_BATCHES = 32
MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def sequence_buckets(
    max_length: int, shares: Sequence[float] = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
) -> tuple[int, ...]:
    """Return the static sequence lengths of training, in increasing order.

    Args:
        max_length: the longest sequence length, in tokens; always the last bucket.
        shares: the other buckets as fractions of `max_length`. Each bucket is rounded up to a
            multiple of 8; a rounded bucket that is not below `max_length` is dropped. The default
            suits training, where the longest row of a batch determines the batch's bucket.

    Returns:
        At most `len(shares) + 1` different lengths: at most five with the default.
    """
    rounded = {8 * math.ceil(max_length * share / 8) for share in shares}
    return (*sorted(length for length in rounded if length < max_length), max_length)


def training_lengths(max_length: int, order: str) -> tuple[int, ...]:
    """Return the static sequence lengths of training batches, in increasing order.

    In the order "length_grouped", a batch has rows of about the same length. There, lengths that
    are 16 apart (or 25%, above 128) save padding that one batch of shuffled rows has in any case.

    Args:
        max_length: the longest sequence length, in tokens; always the last.
        order: see `TrainConfig.order`.
    """
    if order == "length_grouped":
        return sequence_lengths(max_length, multiple=16)
    return sequence_buckets(max_length)


def inference_buckets(max_length: int) -> tuple[int, ...]:
    """Return at most five static sequence lengths for inference, in increasing order.

    Inference groups rows by their own length, so these buckets are closer together at the lengths
    that texts usually have. On SST-2, MRPC and STS-B, they need 2% to 9% fewer tokens, padding
    included, than the buckets of training.
    """
    return sequence_buckets(max_length, (1 / 8, 1 / 4, 3 / 8, 5 / 8))


def bucket_of(length: int, buckets: Sequence[int]) -> int:
    """Return the smallest bucket that holds `length` tokens; `buckets` must be sorted."""
    return next(bucket for bucket in buckets if bucket >= length)


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """Return the number of batches in an epoch, including a last batch that is not full."""
    return math.ceil(num_rows / batch_size)


@functools.lru_cache(maxsize=2)
def _epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def training_rows(
    num_rows: int, batch_size: int, seed: int, step: int, lengths: np.ndarray | None = None
) -> np.ndarray:
    """Return the indices of the rows in the batch of `step`; every epoch holds every row once.

    With `lengths`, rows of similar length share a batch. The shuffled rows of `_GROUPED_BATCHES`
    full batches are sorted by length and cut into batches, and the order of those batches is
    shuffled. Batches are therefore slightly less random than without `lengths`. The rows that do
    not fill a batch form the last batch of the epoch and may have any length: the loss is a mean
    over its batch, so rows of a smaller batch count more, and these rows should not always be long
    rows.

    Args:
        num_rows: rows in the dataset.
        batch_size: rows in a full batch, over all processes.
        seed: seed of the row order.
        step: training step, from 0, counted over all epochs.
        lengths: (num_rows,) length of every row in tokens; None for batches of any lengths.

    Returns:
        `batch_size` row indices, or fewer in the last batch of an epoch.
    """
    epoch, position = divmod(step, steps_per_epoch(num_rows, batch_size))
    rows = _epoch_order(num_rows, seed, epoch)
    full_batches = num_rows // batch_size
    if lengths is not None and position < full_batches:
        window, position = divmod(position, _GROUPED_BATCHES)
        size = _GROUPED_BATCHES * batch_size
        rows = rows[: full_batches * batch_size][window * size : (window + 1) * size]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        # `window + 1`, because the seed [seed, epoch, 0] gives the stream of `_epoch_order`.
        random = np.random.default_rng([seed, epoch, window + 1])
        position = random.permutation(len(rows) // batch_size)[position]
    start = position * batch_size
    return rows[start : start + batch_size]


def rows_of_step(dataset: Dataset, batch_size: int, seed: int, step: int, order: str) -> np.ndarray:
    """Return the `training_rows` of a dataset in the order that `TrainConfig.order` names."""
    lengths = dataset.lengths if order == "length_grouped" else None
    return training_rows(len(dataset), batch_size, seed, step, lengths)


def assemble(
    dataset: Dataset, rows: np.ndarray, batch_size: int, sequence_length: int
) -> dict[str, np.ndarray]:
    """Return the given rows as one batch of shape (batch_size, sequence_length).

    If there are fewer than `batch_size` rows, padding rows follow them. The attention mask of a
    padding row is 0 at every position.

    Returns:
        `input_ids`, `attention_mask` and `token_type_ids` (int32), `valid` (bool: true for rows of
        the dataset, false for padding rows) and, if the dataset has labels, `labels`.
    """
    part = dataset.take(rows).resized(sequence_length)

    def padded(values: np.ndarray, dtype) -> np.ndarray:
        result = np.zeros((batch_size, *values.shape[1:]), dtype)
        result[: len(values)] = values
        return result

    batch = {
        "input_ids": padded(part.input_ids, np.int32),
        "attention_mask": padded(part.attention_mask, np.int32),
        "token_type_ids": padded(part.token_type_ids, np.int32),
        "valid": np.arange(batch_size) < len(part),
    }
    if part.labels is not None:
        batch["labels"] = padded(part.labels, part.labels.dtype)
    return batch


def training_batch(
    dataset: Dataset,
    batch_size: int,
    buckets: Sequence[int],
    seed: int,
    step: int,
    order: str = "shuffled",
    batch_rows: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Return the batch of `step`, or the part of the batch that one process needs.

    The sequence length is the smallest bucket that holds the longest row of the whole batch.
    Processes that assemble different parts of a batch therefore use the same sequence length.

    Args:
        order: see `TrainConfig.order`.
        batch_rows: the rows of the batch to assemble, as ascending indices below `batch_size`;
            absent, all rows.
    """
    rows = rows_of_step(dataset, batch_size, seed, step, order)
    longest = int(dataset.lengths[rows].max())
    if batch_rows is None:
        batch_rows = np.arange(batch_size)
    existing = batch_rows[batch_rows < len(rows)]  # The last batch of an epoch may have fewer rows.
    return assemble(dataset, rows[existing], len(batch_rows), bucket_of(longest, buckets))


def prefetched(blocks: Iterable[Block]) -> Generator[Block]:
    """Yield the same blocks (of rows, or batches); a thread makes the next block in advance.

    A separate thread is needed because dispatching a program may block the calling thread: a GPU
    synchronizes with the host after every iteration of a loop whose condition depends on data.
    """
    blocks = iter(blocks)
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as thread:
        next_block = thread.submit(next, blocks, None)
        while (block := next_block.result()) is not None:
            next_block = thread.submit(next, blocks, None)
            yield block


def batches_by_bucket(
    blocks: Iterable[Dataset], batch_size: int, buckets: Sequence[int]
) -> Iterator[tuple[np.ndarray, Dataset]]:
    """Yield inference batches whose rows share a bucket.

    A batch is yielded as soon as `batch_size` rows of its bucket have been read. The remaining
    rows of every bucket are yielded at the end of the input.

    Args:
        blocks: consecutive parts of the input.
        batch_size: largest number of rows in a batch.
        buckets: sequence lengths in increasing order; the last bucket holds the longest row.

    Yields:
        The row indices in the whole input, and those rows, cut or padded to their bucket.
    """
    waiting: dict[int, tuple[np.ndarray, Dataset]] = {}
    offset = 0
    for block in blocks:
        bucket_indices = np.searchsorted(buckets, block.lengths)
        for index in np.unique(bucket_indices):
            bucket, block_rows = buckets[index], np.flatnonzero(bucket_indices == index)
            rows, part = offset + block_rows, block.take(block_rows).resized(bucket)
            if bucket in waiting:
                waiting_rows, waiting_part = waiting.pop(bucket)
                rows, part = np.concatenate([waiting_rows, rows]), waiting_part.concatenated(part)
            batched = len(rows) // batch_size * batch_size
            for start in range(0, batched, batch_size):
                batch = slice(start, start + batch_size)
                yield rows[batch], part.take(batch)
            if batched < len(rows):
                waiting[bucket] = rows[batched:], part.take(slice(batched, None))
        offset += len(block)
    for bucket in sorted(waiting):
        yield waiting[bucket]
