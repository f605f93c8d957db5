"""What needs the rows of a ragged batch: attention, and what an exit reads.

Attention copies rows of about one length into a block, in which they are padded to their length
class. The program has two products and a softmax per class, selected by a `switch`; everything else
has the same shape for all classes, so that a class costs little time to compile. An exit reads its
rows in steps of a few tokens, and needs no classes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pabee_jax.drivers.ragged import ActiveRows, chunk_of, read, store, take
from pabee_jax.models.layers import product
from pabee_jax.models.side_inputs import SideInputs
from pabee_jax.models.transformer import TokenHeads, attention

# An exit reads this many tokens of each of its rows at a time.
STEP = 32


@dataclasses.dataclass(frozen=True)
class Attention:
    """Attention of the tokens of active rows to their own rows, block by block.

    Attributes:
        block_tokens: the tokens of a block, with its padding.
        lengths: the length classes, in ascending order; see `ChunkSizes`.
    """

    block_tokens: int
    lengths: tuple[int, ...]

    def __call__(
        self,
        query: Array,
        keys: Array,
        values: Array,
        rows: ActiveRows,
        mask: Int[Array, " tokens"],
        side: SideInputs,
        dtype: jnp.dtype,
    ) -> Array:
        """Return `query` with the attention of every active token in place of its query.

        Args:
            query, keys, values: stored arrays (tokens, heads, features) in which the active rows
                are at their `offsets`.
            rows: the active rows.
            mask: the attention mask of the batch.
            side: the side inputs of the layer.
            dtype: the compute dtype.
        """
        slots = jnp.arange(self.block_tokens)

        def attend(carry):
            first, query = carry
            # The rows are in descending order of length, so the first row decides the class.
            length_class = jnp.sum(jnp.array(self.lengths[:-1], jnp.int32) < rows.lengths[first])
            length = jnp.array(self.lengths)[length_class]
            last = jnp.minimum(first + self.block_tokens // length, rows.num_rows) - 1
            row, position = first + slots // length, slots % length
            is_token = (row <= last) & (position < rows.lengths[jnp.minimum(row, last)])
            row = jnp.minimum(row, last)
            position = jnp.minimum(position, rows.lengths[row] - 1)
            is_token &= take(mask, rows.batch_offsets[row] + position) != 0
            index = rows.offsets[row] + position
            block = [_by_head(read(array, index, dtype)) for array in (query, keys, values)]
            context = jax.lax.switch(
                length_class, [self._at(length) for length in self.lengths], *block, is_token, side
            )
            # The rows of the block, from their padded places to consecutive ones.
            start = rows.offsets[first]
            chunk = chunk_of(rows, start, self.block_tokens)
            place = jnp.minimum(chunk.row, last) - first
            context = take(context.swapaxes(0, 1), place * length + chunk.position)
            is_in_block = (chunk.is_token & (chunk.row <= last))[:, None, None]
            old = jax.lax.dynamic_slice_in_dim(query, start, self.block_tokens)
            new = jnp.where(is_in_block, store(context, dtype), old)
            return last + 1, jax.lax.dynamic_update_slice_in_dim(query, new, start, 0)

        carry = jnp.zeros_like(rows.num_rows), query
        return jax.lax.while_loop(lambda carry: carry[0] < rows.num_rows, attend, carry)[1]

    def _at(self, length: int) -> Callable[..., Array]:
        """Return the attention of a block whose rows are padded to `length` tokens."""
        rows = self.block_tokens // length
        used = rows * length

        def attend(query, keys, values, is_token, side):
            heads, features = len(query) // self.block_tokens, query.shape[-1]

            def by_row(values):
                values = values.reshape(heads, self.block_tokens, features)[:, :used]
                return values.reshape(heads * rows, length, 1, features)

            mask = jnp.tile(is_token[:used].reshape(rows, length), (heads, 1))
            side = side.of_heads_as_rows(rows, length)
            context = attention(by_row(query), by_row(keys), by_row(values), mask, side)
            context = context.astype(query.dtype).reshape(heads, used, features)
            return jnp.pad(context, ((0, 0), (0, self.block_tokens - used), (0, 0)))

        return attend


def _by_head(values: TokenHeads) -> Float[Array, "heads_tokens features"]:
    """Return all tokens of the first head, of the second head, and so on.

    In this order, the products of a length class need no transposed copies. As the arrays are flat,
    XLA makes the one copy here, and not in every class.
    """
    return values.swapaxes(0, 1).reshape(-1, values.shape[-1])


class RowTokens(NamedTuple):
    """The tokens of some rows, of which an exit reads `STEP` of each row at a time.

    Attributes:
        lengths: the tokens of each row.
        starts: where each row starts in the stored arrays.
        batch_offsets: where each row starts in `mask`.
        mask: the attention mask of the batch.
    """

    lengths: Int[Array, " rows"]
    starts: Int[Array, " rows"]
    batch_offsets: Int[Array, " rows"]
    mask: Int[Array, " tokens"]

    def mean(
        self, size: int, values: Callable[[Int[Array, "rows step"]], Float[Array, "rows step size"]]
    ) -> Float[Array, "rows size"]:
        """Return the mean over the tokens of each row, in float32; 0 for a row without tokens.

        Args:
            size: the features of a token.
            values: (the indices of tokens) -> their values.
        """

        def add(carry, first, index, is_token):
            del first
            total, count = carry
            total += jnp.where(is_token[:, :, None], values(index), 0.0).sum(axis=1)
            return total, count + is_token.sum(axis=1)

        zeros = jnp.zeros_like(self.lengths)
        total = jnp.broadcast_to(zeros[:, None].astype(jnp.float32), (len(zeros), size))
        total, count = self._over_steps(add, (total, zeros))
        return total / jnp.maximum(count, 1)[:, None]

    def attention_of_first_tokens(
        self,
        query: Float[Array, "rows heads features"],
        keys_values: Callable[[Int[Array, "rows step"]], tuple[Array, Array]],
        side: SideInputs,
    ) -> Float[Array, "rows heads features"]:
        """Return the attention of the first token of each row, in float32.

        The softmax has a running maximum and a running sum (arXiv 1805.02867).

        Args:
            query: the queries of the first tokens.
            keys_values: (the indices of tokens) -> their keys and values.
            side: the side inputs of the layer, for rows of a multiple of `STEP` tokens.
        """
        excluded = jnp.finfo(jnp.float32).min

        def attend(carry, first, index, is_token):
            maximum, total, context = carry
            keys, values = keys_values(index)
            scores = product("bqhd,bkhd->bhqk", query[:, None], keys) / query.shape[-1] ** 0.5
            scores = side.on_scores(scores, is_token, first)
            new_maximum = jnp.maximum(maximum, scores.max(axis=-1, keepdims=True))
            weights = jnp.where(scores > excluded, jnp.exp(scores - new_maximum), 0.0)
            added = product("bhqk,bkhd->bqhd", weights.astype(values.dtype), values)
            scale = jnp.exp(maximum - new_maximum)
            total = total * scale + weights.sum(axis=-1, keepdims=True)
            return new_maximum, total, context * scale.swapaxes(1, 2) + added

        zeros = jnp.zeros_like(query[:, None], jnp.float32)
        total = zeros[..., :1].swapaxes(1, 2)
        _, total, context = self._over_steps(attend, (total + excluded, total, zeros))
        return (context / jnp.maximum(total, jnp.finfo(jnp.float32).tiny).swapaxes(1, 2))[:, 0]

    def _over_steps(self, function: Callable[..., Any], carry: Any) -> Any:
        """Return the carry after `function(carry, first, index, is_token)` for all steps.

        `first` is the position of the first token of the step, `index` (rows, STEP) are the indices
        of its tokens in the stored arrays, and `is_token` says which are tokens that may be read.
        """

        def run(state):
            first, carry = state
            position = first + jnp.arange(STEP)
            is_token = position < self.lengths[:, None]
            position = jnp.minimum(position, jnp.maximum(self.lengths - 1, 0)[:, None])
            is_token &= take(self.mask, self.batch_offsets[:, None] + position) != 0
            return first + STEP, function(carry, first, self.starts[:, None] + position, is_token)

        state = jnp.zeros_like(self.lengths[0]), carry
        return jax.lax.while_loop(lambda state: state[0] < jnp.max(self.lengths), run, state)[1]
