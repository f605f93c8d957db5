"""Rows -> batches of static shapes. A training batch is a pure function of (seed, step)."""

import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from pabee_jax.data.tokenization import Dataset


def sequence_buckets(max_length: int) -> tuple[int, ...]:
    """At most five static sequence lengths: 1/8, 1/4, 1/2, 3/4 and all of `max_length`."""
    shares = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
    rounded = {8 * math.ceil(max_length * share / 8) for share in shares}
    return (*sorted(length for length in rounded if length < max_length), max_length)


def bucket_of(length: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `length` tokens."""
    return next(bucket for bucket in buckets if bucket >= length)


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """Batches in an epoch; the last one may be partly padding."""
    return math.ceil(num_rows / batch_size)


@functools.lru_cache(maxsize=2)
def _epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def training_rows(num_rows: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Which rows the batch of `step` (from 0) holds; every epoch sees every row once."""
    epoch, position = divmod(step, steps_per_epoch(num_rows, batch_size))
    start = position * batch_size
    return _epoch_order(num_rows, seed, epoch)[start : start + batch_size]


def assemble(
    dataset: Dataset, rows: np.ndarray, batch_size: int, sequence_length: int
) -> dict[str, np.ndarray]:
    """A batch of exactly (batch_size, sequence_length), padded where rows are missing.

    Returns `input_ids`, `attention_mask`, `token_type_ids` (all int32), `valid` (bool: the row is
    real) and, when the dataset has labels, `labels`. Padding rows attend to nothing.
    """

    def padded(values: np.ndarray, dtype) -> np.ndarray:
        result = np.zeros((batch_size, *values.shape[1:]), dtype)
        result[: len(rows)] = values[rows]
        return result

    def fitted(values: np.ndarray) -> np.ndarray:
        values = padded(values[:, :sequence_length], np.int32)
        return np.pad(values, ((0, 0), (0, sequence_length - values.shape[1])))

    batch = {
        "input_ids": fitted(dataset.input_ids),
        "attention_mask": fitted(dataset.attention_mask),
        "token_type_ids": fitted(dataset.token_type_ids),
        "valid": np.arange(batch_size) < len(rows),
    }
    if dataset.labels is not None:
        batch["labels"] = padded(dataset.labels, dataset.labels.dtype)
    return batch


def training_batch(
    dataset: Dataset, batch_size: int, buckets: Sequence[int], seed: int, step: int
) -> dict[str, np.ndarray]:
    """The batch of `step`, cut to the smallest bucket that holds its longest row."""
    rows = training_rows(len(dataset), batch_size, seed, step)
    longest = int(dataset.lengths[rows].max())
    return assemble(dataset, rows, batch_size, bucket_of(longest, buckets))


def length_grouped(
    lengths: np.ndarray, batch_size: int, buckets: Sequence[int]
) -> Iterator[tuple[np.ndarray, int]]:
    """Rows for inference, grouped by bucket: (at most batch_size row indices, sequence length)."""
    which = np.searchsorted(buckets, lengths)
    for index, bucket in enumerate(buckets):
        rows = np.flatnonzero(which == index)
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size], bucket
