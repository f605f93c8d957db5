"""Rows of different lengths without padding: flat arrays of tokens, one row after the other.

What a layer does to single tokens (its linear maps, LayerNorm, activation) runs on chunks of these
arrays, whatever the rows are; `row_tokens` has what needs the rows. The rows are in descending
order of length.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from pabee_jax.drivers.shapes import run_while_more_than


class RaggedBatch(NamedTuple):
    """Rows of different lengths, the longest first, without padding between their tokens.

    Attributes:
        input_ids: the tokens of the first row, then of the second row, and so on; zeros after the
            last row.
        attention_mask: 0 at tokens that may not be attended to.
        token_type_ids: the segment of each token.
        positions: the position of each token in its row.
        lengths: the tokens of each row, in descending order; 0 for rows that do not exist.
    """

    input_ids: Int[Array | np.ndarray, " tokens"]
    attention_mask: Int[Array | np.ndarray, " tokens"]
    token_type_ids: Int[Array | np.ndarray, " tokens"]
    positions: Int[Array | np.ndarray, " tokens"]
    lengths: Int[Array | np.ndarray, " rows"]


class ActiveRows(NamedTuple):
    """The rows that have not exited, in the order of the batch. Inactive rows follow.

    Attributes:
        order: the index of each row in the batch.
        lengths: the tokens of each row; 0 for inactive rows.
        sources: where the tokens of each row start in the arrays before a layer.
        offsets: where they start if only active rows are stored.
        batch_offsets: where they start in the batch.
        num_rows: the number of active rows.
        num_tokens: the number of their tokens.
    """

    order: Int[Array, " rows"]
    lengths: Int[Array, " rows"]
    sources: Int[Array, " rows"]
    offsets: Int[Array, " rows"]
    batch_offsets: Int[Array, " rows"]
    num_rows: Int[Array, ""]
    num_tokens: Int[Array, ""]

    def in_batch_order(self, values: Array) -> Array:
        """Return one value per row of the batch, from values in the order of `order`."""
        return values[jnp.argsort(self.order)]


def active_rows(
    lengths: Int[Array | np.ndarray, " rows"],
    sources: Int[Array, " rows"],
    done: Bool[Array, " rows"],
) -> ActiveRows:
    """Return the rows that are not done; their order is the order of the batch."""
    order = jnp.argsort(done, stable=True)
    active_lengths = jnp.where(done, 0, lengths)[order]
    ends = jnp.cumsum(active_lengths)
    return ActiveRows(
        order=order,
        lengths=active_lengths,
        sources=sources[order],
        offsets=ends - active_lengths,
        batch_offsets=(jnp.cumsum(lengths) - lengths)[order],
        num_rows=jnp.sum(~done),
        num_tokens=ends[-1],
    )


class Chunk(NamedTuple):
    """Consecutive active tokens that run together.

    Attributes:
        row: the index of each token's row among the active rows.
        position: the position of each token in its row.
        is_token: false after the last active token, which is then repeated.
    """

    row: Int[Array, " tokens"]
    position: Int[Array, " tokens"]
    is_token: Bool[Array, " tokens"]


def chunk_of(rows: ActiveRows, start: Int[Array, ""], size: int) -> Chunk:
    """Return `size` tokens of the active rows, from the token `start` on."""
    slots = start + jnp.arange(size)
    token = jnp.minimum(slots, rows.num_tokens - 1)
    row = jnp.searchsorted(rows.offsets + rows.lengths, token, side="right", method="scan_unrolled")
    return Chunk(row, token - rows.offsets[row], slots < rows.num_tokens)


def map_tokens(
    function: Callable[[Any, Int[Array, " tokens"]], Mapping[str, Array]],
    tokens: Any,
    rows: ActiveRows,
    starts: Int[Array, " rows"],
    sizes: Sequence[int],
    dtype: jnp.dtype,
) -> Any:
    """Return `tokens` with new values of the active tokens, which start at `rows.offsets`.

    Args:
        function: (the values of a chunk, the positions of its tokens) -> new values by field.
        tokens: a named tuple of stored arrays.
        rows: the active rows.
        starts: where the active rows start in `tokens`, never before their `offsets`: a chunk then
            overwrites only what it and the chunks before it have read.
        sizes: the sizes of chunks, in descending order.
        dtype: the compute dtype.
    """
    start = jnp.zeros_like(rows.num_tokens)
    for size, rest in zip(sizes, run_while_more_than(sizes), strict=True):

        def some_remain(carry, rest=rest):
            return rows.num_tokens - carry[0] > rest

        def run(carry, size=size):
            start, tokens = carry
            chunk = chunk_of(rows, start, size)
            index = starts[chunk.row] + chunk.position
            values = jax.tree.map(lambda stored: read(stored, index, dtype), tokens)
            updates = {
                name: jax.lax.dynamic_update_slice_in_dim(
                    getattr(tokens, name), store(new, dtype), start, 0
                )
                for name, new in function(values, chunk.position).items()
            }
            return start + size, tokens._replace(**updates)

        start, tokens = jax.lax.while_loop(some_remain, run, (start, tokens))
    return tokens


def take(values: Array | np.ndarray, index: Int[Array, "*indices"]) -> Array:
    """Return `values[index]`; indices beyond the array give the array's last values."""
    return jnp.asarray(values).at[index].get(mode="clip")


def slices(values: Array | np.ndarray, first: Int[Array, ""], size: int) -> Array:
    """Return `size` values from `first` on; after the end of `values`, its last value."""
    return take(values, first + jnp.arange(size))


def store(values: Array, dtype: jnp.dtype) -> Array:
    """Return values as a pool stores them: bfloat16 as the integers with the same bits.

    XLA's CPU backend copies bfloat16 arrays by converting them to float32 and back. For an update
    of a few rows in a loop, it converts the whole array.
    """
    values = values.astype(dtype)
    return jax.lax.bitcast_convert_type(values, jnp.uint16) if dtype == jnp.bfloat16 else values


def read(stored: Array, index: Int[Array, "*indices"], dtype: jnp.dtype) -> Array:
    """Return the values at these indices of an array of `store`."""
    values = take(stored, index)
    return jax.lax.bitcast_convert_type(values, dtype) if dtype == jnp.bfloat16 else values
