"""Rows without padding for the driver `pool`: blocks that fit a pool, and their flat arrays."""

from collections.abc import Iterable, Iterator

import numpy as np

from pabee_jax.data.batching import MODEL_INPUTS
from pabee_jax.data.dataset import Dataset
from pabee_jax.drivers.ragged import RaggedBatch


def blocks_that_fit(
    blocks: Iterable[Dataset], max_rows: int, max_tokens: int
) -> Iterator[tuple[np.ndarray, Dataset]]:
    """Yield consecutive rows of the input, as many as fit into a pool.

    Args:
        blocks: consecutive parts of the input.
        max_rows: the most rows of a result.
        max_tokens: the most tokens of a result; no row is longer.

    Yields:
        The row indices in the whole input, and those rows, padded to the longest of them.
    """
    parts: list[Dataset] = []
    first, num_rows, num_tokens = 0, 0, 0
    for block in blocks:
        start = 0
        while start < len(block):
            ends = np.cumsum(block.lengths[start:])
            fit = int(np.searchsorted(ends, max_tokens - num_tokens, side="right"))
            fit = min(fit, max_rows - num_rows)
            if fit:
                parts.append(block.take(slice(start, start + fit)))
                start += fit
                num_rows += fit
                num_tokens += int(ends[fit - 1])
            if start < len(block):
                yield first + np.arange(num_rows), _joined(parts)
                parts, first, num_rows, num_tokens = [], first + num_rows, 0, 0
    if parts:
        yield first + np.arange(num_rows), _joined(parts)


def _joined(parts: list[Dataset]) -> Dataset:
    width = max(part.input_ids.shape[1] for part in parts)
    parts = [part.resized(width) for part in parts]
    return Dataset(*(np.concatenate([part[name] for part in parts]) for name in MODEL_INPUTS))


def packed(
    rows: Dataset, devices: int, max_rows: int, max_tokens: int, longest: int
) -> tuple[RaggedBatch, np.ndarray]:
    """Return the rows as one ragged batch per device, and where each row is.

    The rows are dealt to the devices in descending order of length, so that the tokens of two
    devices differ by at most the longest row.

    Args:
        rows: the rows.
        devices: the number of devices.
        max_rows: the rows of the batch of a device.
        max_tokens: the tokens of the batch of a device.
        longest: the most tokens of a row for which the program is compiled.

    Returns:
        The batches of all devices, one after the other in the same arrays; and for each row its
        index in `RaggedBatch.lengths`.

    Raises:
        ValueError: a row has more than `longest` tokens.
    """
    if len(rows) and rows.lengths.max() > longest:
        raise ValueError(f"a row has {rows.lengths.max()} tokens; the program is for {longest}")
    by_length = np.argsort(-rows.lengths, kind="stable")
    shapes = [max_tokens] * 4 + [max_rows]
    batch = RaggedBatch(*(np.zeros((devices, size), np.int32) for size in shapes))
    places = np.empty(len(rows), np.int64)
    for device in range(devices):
        chosen = by_length[device::devices]
        part, lengths = rows.take(chosen), rows.lengths[chosen]
        positions = np.broadcast_to(np.arange(part.input_ids.shape[1]), part.input_ids.shape)
        is_token = positions < lengths[:, None]
        arrays = (part.input_ids, part.attention_mask, part.token_type_ids, positions)
        for values, array in zip(batch, arrays, strict=False):
            values[device, : lengths.sum()] = array[is_token]
        batch.lengths[device, : len(chosen)] = lengths
        places[chosen] = device * max_rows + np.arange(len(chosen))
    return RaggedBatch(*(values.reshape(-1) for values in batch)), places
