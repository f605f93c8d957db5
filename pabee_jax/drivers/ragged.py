"""Rows of different lengths without padding: flat arrays of tokens, and chunks of whole rows.

The tokens of all rows stand one after the other in arrays of shape (tokens, ...). What a layer does
to single tokens (its linear maps, LayerNorm, activation) runs on a chunk of such an array. Only
attention needs rows: it copies the rows of a chunk into a block that is padded to the chunk's
length class. The rows are in descending order of length, so the rows of a chunk are about equally
long and the block has little padding.

The program has one attention per length class, selected by a `switch`. This switch has no weights,
so the number of classes does not multiply the layers.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from pabee_jax.drivers.shapes import ChunkSizes, sequence_lengths
from pabee_jax.models.side_inputs import SideInputs
from pabee_jax.models.transformer import TokenHeads, attention

# A chunk has at most one row per this many tokens: tokenizers give a text at least three.
_TOKENS_PER_ROW = 4


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
    """Consecutive active rows, as a window of a flat array.

    Attributes:
        num_rows: the rows of the chunk.
        num_tokens: their tokens; the rest of the window does not belong to the chunk.
        length_class: the index of the smallest sequence length that holds every row.
        offsets: where each row starts in the window.
        lengths: the tokens of each row; 0 after the last row.
        row: the row of each token.
        position: the position of each token in its row.
    """

    num_rows: Int[Array, ""]
    num_tokens: Int[Array, ""]
    length_class: Int[Array, ""]
    offsets: Int[Array, " rows"]
    lengths: Int[Array, " rows"]
    row: Int[Array, " tokens"]
    position: Int[Array, " tokens"]

    def tokens_from(self, starts: Int[Array, " rows"]) -> Int[Array, " tokens"]:
        """Return the index of each token in an array in which the rows start at `starts`."""
        return starts[self.row] + self.position


class ChunkShape(NamedTuple):
    """The static sizes of one kind of chunk.

    Attributes:
        tokens: the tokens of a chunk's window.
        longest: the most tokens of a row of the chunk, at most `tokens`.
        block_tokens: the tokens of the padded block.
    """

    tokens: int
    longest: int
    block_tokens: int

    @property
    def lengths(self) -> tuple[int, ...]:
        """The length classes, in ascending order: attention pads the rows of a chunk to one.

        They follow from the longest row, so that no row of the chunk is longer than the last.
        """
        return sequence_lengths(self.longest)

    @property
    def rows(self) -> int:
        """The largest number of rows."""
        return max(1, self.tokens // _TOKENS_PER_ROW)

    @property
    def rows_of_class(self) -> tuple[int, ...]:
        """The rows of the block of each length class.

        The window is full before the block is, unless the chunk has rows of a shorter class.
        """
        shorter, block = (0, *self.lengths), self.block_tokens
        return tuple(min(self.rows, max(1, block // (length + 1))) for length in shorter[:-1])

    def chunk_from(self, rows: ActiveRows, first: Int[Array, ""]) -> Chunk:
        """Return the chunk that starts with the active row `first` and has as many as fit."""
        lengths = slices(rows.lengths, first, self.rows)
        offsets = slices(rows.offsets, first, self.rows) - rows.offsets[first]
        length_class = class_of(self.lengths, lengths[0])
        limit = jnp.array(self.rows_of_class)[length_class]
        ends = offsets + lengths  # Ascending, so the rows that fit come first.
        number = jnp.arange(self.rows)
        fits = (ends <= self.tokens) & (number < limit) & (first + number < rows.num_rows)
        num_rows = jnp.sum(fits)
        slots = jnp.arange(self.tokens)
        row = jnp.searchsorted(ends, slots, side="right", method="scan_unrolled")
        row = jnp.clip(row, 0, num_rows - 1)
        return Chunk(
            num_rows=num_rows,
            num_tokens=jnp.sum(jnp.where(fits, lengths, 0)),
            length_class=length_class,
            offsets=offsets,
            lengths=jnp.where(fits, lengths, 0),
            row=row,
            # Slots after the last token repeat it.
            position=jnp.minimum(slots - offsets[row], lengths[row] - 1),
        )

    def attend(
        self,
        chunk: Chunk,
        token_mask: Bool[Array, " tokens"],
        side: SideInputs,
        query: TokenHeads,
        keys: TokenHeads,
        values: TokenHeads,
    ) -> TokenHeads:
        """Return the attention of every token of the chunk to its own row."""

        def at_length(length: int, rows: int):
            def attend(chunk, token_mask, query, keys, values):
                index = chunk.offsets[:rows, None] + jnp.arange(length)
                index = jnp.minimum(index, self.tokens - 1)
                mask = jnp.arange(length) < chunk.lengths[:rows, None]
                mask = mask & take(token_mask, index)
                context = attention(
                    take(query, index), take(keys, index), take(values, index), mask, side
                ).astype(query.dtype)
                return take(
                    context.reshape(rows * length, *query.shape[1:]),
                    jnp.minimum(chunk.row * length + chunk.position, rows * length - 1),
                )

            return attend

        branches = [
            at_length(*shape) for shape in zip(self.lengths, self.rows_of_class, strict=True)
        ]
        return jax.lax.switch(chunk.length_class, branches, chunk, token_mask, query, keys, values)


def chunk_shapes(sizes: ChunkSizes) -> list[ChunkShape]:
    """Return the shapes of the chunks, in descending order; a short chunk has no long rows."""
    return [
        ChunkShape(size, min(size, sizes.longest), sizes.block_factor * size)
        for size in sizes.tokens
    ]


def over_rows(
    lengths: Sequence[int],
    row_lengths: Int[Array, " rows"],
    starts: Int[Array, " rows"],
    at_block: Callable[[Int[Array, "rows seq"], Bool[Array, "rows seq"]], Array],
) -> Array:
    """Call `at_block` with the tokens of some rows at the smallest of `lengths` that holds them.

    Args:
        lengths: the length classes, in ascending order.
        row_lengths: the tokens of each row; the first row is the longest.
        starts: where each row starts in a flat array.
        at_block: (the index of each token in the flat array, whether it is a token of the row) ->
            an array whose shape does not depend on the length.
    """

    def at_length(length: int):
        def run(row_lengths, starts):
            positions = jnp.arange(length)
            return at_block(starts[:, None] + positions, positions < row_lengths[:, None])

        return run

    branches = [at_length(length) for length in lengths]
    return jax.lax.switch(class_of(lengths, row_lengths[0]), branches, row_lengths, starts)


def class_of(lengths: Sequence[int], length: Int[Array, ""]) -> Int[Array, ""]:
    """Return the index of the smallest of `lengths` that is at least `length`."""
    return jnp.sum(jnp.array(lengths[:-1], jnp.int32) < length)


def take(values: Array | np.ndarray, index: Int[Array, "*indices"]) -> Array:
    """Return `values[index]`; indices beyond the array give the array's last values."""
    values = jnp.asarray(values)
    return from_bits(to_bits(values).at[index].get(mode="clip"), values.dtype)


def to_bits(values: Array) -> Array:
    """Return bfloat16 values as the integers with the same bits; return other values unchanged.

    XLA's CPU backend copies bfloat16 arrays by converting them to float32 and back. For an update
    of a few rows in a loop, it converts the whole array.
    """
    if values.dtype == jnp.bfloat16:
        return jax.lax.bitcast_convert_type(values, jnp.uint16)
    return values


def from_bits(values: Array, dtype: jnp.dtype) -> Array:
    """Return the values of type `dtype` from the result of `to_bits`."""
    return values if values.dtype == dtype else jax.lax.bitcast_convert_type(values, dtype)


def slices(values: Array | np.ndarray, first: Int[Array, ""], size: int) -> Array:
    """Return `size` values from `first` on; after the end of `values`, its last value."""
    return take(values, first + jnp.arange(size))
