"""Driver `pool`: runs many rows layer by layer and computes only the rows that have not exited.

The rows have different lengths and no padding (see `ragged`). The pool keeps the tokens of the
active rows (the rows that have not exited) in flat arrays. At every layer, it copies them chunk by
chunk out of these arrays and back, without the rows that have exited, so that the active rows stay
in order and without gaps.

With CLS pooling, a row does not need its exit layer for all tokens. The exit reads only the first
token, for which the layer computes keys and values of all tokens (a sixth of its matrix products)
and everything else for one token. A layer therefore has two parts:

1. For the tokens of the active rows, chunk by chunk: finish the previous layer, and compute the
   keys and values of the current layer.
2. For the first tokens of the active rows, many rows at a time: finish the current layer, and
   compute the logits of its exit.

With mean pooling, the first part is the whole layer, and the second part only the exit.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pabee_jax.criteria import ExitCriterion
from pabee_jax.drivers.exit_rule import Exits
from pabee_jax.drivers.layer_loop import CONTROL, Control, Layer, on_group, run_layers, zero_logits
from pabee_jax.drivers.ragged import (
    ActiveRows,
    RaggedBatch,
    active_rows,
    chunk_shapes,
    from_bits,
    over_rows,
    slices,
    take,
    to_bits,
)
from pabee_jax.drivers.shapes import ChunkSizes, run_while_more_than
from pabee_jax.models.encoder import EarlyExitModel, full_precision
from pabee_jax.models.side_inputs import SideInputs
from pabee_jax.models.transformer import TokenHeads, Tokens, attention


class PoolState(NamedTuple):
    """What the pool carries from layer to layer.

    Attributes:
        tokens: arrays (tokens, ...) of the rows that were active in the last layer: the hidden
            states, and with CLS pooling the keys and values of the layer that was started; as
            `to_bits` returns them.
        starts: where the tokens of each row of the batch start in these arrays.
    """

    tokens: Any
    starts: Int[Array, " rows"]


def pooled_early_exit(
    model: EarlyExitModel,
    batch: RaggedBatch,
    criterion: ExitCriterion,
    row: Int[Array, " rows"] | None = None,
    *,
    sizes: ChunkSizes,
    control: Control = CONTROL,
) -> Exits:
    """Return the same as `early_exit`, computing each row only up to its exit layer.

    The cost is the sum, over the rows, of tokens times exit layer. Call it under `jit`. A row
    without tokens counts as having exited before the first layer; its exit layer is 0.

    Args:
        model: the model.
        batch: the rows.
        criterion: decides which rows exit.
        row: each row's index in the call, for the criterion; absent, its index in the batch.
        sizes: the sizes of chunks.
        control: how the test "has every row exited?" is compiled.
    """
    pool = PooledLayers(model, batch, sizes, model.side_inputs(sizes.longest))
    done = batch.lengths == 0
    return run_layers(model, pool.embedded(), done, criterion, row, pool.run_layer, control)


def pooled_all_exit_logits(
    model: EarlyExitModel, batch: RaggedBatch, *, sizes: ChunkSizes
) -> Float[Array, "exits rows classes"]:
    """Return the same as `all_exit_logits`, without padding; zeros for a row without tokens.

    Args:
        model, batch, sizes: as for `pooled_early_exit`.
    """
    pool = PooledLayers(model, batch, sizes, model.side_inputs(sizes.longest))
    layers, done = jnp.arange(model.config.num_hidden_layers), batch.lengths == 0
    return jax.lax.scan(
        lambda state, layer: pool.run_layer(layer, state, done), pool.embedded(), layers
    )[1]


@dataclasses.dataclass(frozen=True)
class PooledLayers:
    """The layers of a model over a ragged batch.

    `side` is for rows of up to `sizes.longest` tokens.
    """

    model: EarlyExitModel
    batch: RaggedBatch
    sizes: ChunkSizes
    side: SideInputs

    @property
    def reads_first_token(self) -> bool:
        """Whether exits read the first token, so that a layer is only started before an exit."""
        return self.model.config.exit_pooling == "cls"

    def embedded(self) -> PoolState:
        """Return the state before the first layer."""
        batch, config = self.batch, self.model.config
        num_tokens, chunk = jnp.sum(batch.lengths), self.sizes.tokens[0]
        size = len(batch.input_ids) + chunk  # A chunk's window may extend beyond the last token.

        def zeros(*shape: int) -> Array:
            # Derived from the batch, so that the arrays are sharded as the batch is.
            zero = to_bits((0 * num_tokens).astype(self.model.dtype))
            return jnp.broadcast_to(zero, (size, *shape))

        def embed_chunk(index, hidden):
            names = (batch.input_ids, batch.token_type_ids, batch.positions)
            ids, segments, positions = (slices(values, index * chunk, chunk) for values in names)
            embedded = self.model.embeddings(ids, segments, positions)
            return jax.lax.dynamic_update_slice_in_dim(hidden, to_bits(embedded), index * chunk, 0)

        with full_precision(self.model.dtype):
            chunks = (num_tokens + chunk - 1) // chunk
            hidden = jax.lax.fori_loop(0, chunks, embed_chunk, zeros(config.hidden_size))
        heads = config.num_attention_heads
        features = config.hidden_size // heads
        keys_values = (zeros(heads, features), zeros(heads, features))
        tokens = (hidden, keys_values) if self.reads_first_token else hidden
        return PoolState(tokens, jnp.cumsum(batch.lengths) - batch.lengths)

    def run_layer(
        self, layer: Layer, state: PoolState, done: Bool[Array, " rows"]
    ) -> tuple[PoolState, Float[Array, "rows classes"]]:
        """Run `layer` for the rows that are not done; return the logits of its exit."""
        rows = active_rows(self.batch.lengths, state.starts, done)
        with full_precision(self.model.dtype):
            tokens = self.run_tokens(layer, state.tokens, rows)
            logits = self.run_exits(layer, tokens, rows, rows.offsets)
        state = PoolState(tokens, rows.in_batch_order(rows.offsets))
        return state, rows.in_batch_order(logits)

    def _take(self, stored: Array, index: Array) -> Array:
        """Return values of one of the arrays of `PoolState.tokens`."""
        return from_bits(take(stored, index), self.model.dtype)

    def run_tokens(self, layer: Layer, tokens: Any, rows: ActiveRows) -> Any:
        """Run the first part of a layer, chunk by chunk; return the tokens of the active rows."""
        first = jnp.zeros_like(rows.num_rows)
        rests = run_while_more_than(self.sizes.tokens)
        for shape, rest in zip(chunk_shapes(self.sizes), rests, strict=True):

            def some_remain(carry, rest=rest):
                first, _ = carry
                start = jnp.where(first < rows.num_rows, take(rows.offsets, first), rows.num_tokens)
                return rows.num_tokens - start > rest

            def run_chunk(carry, shape=shape):
                first, tokens = carry
                chunk = shape.chunk_from(rows, first)
                of_rows = [
                    slices(starts, first, shape.rows)
                    for starts in (rows.sources, rows.batch_offsets)
                ]
                source, batch_index = map(chunk.tokens_from, of_rows)
                mask = take(self.batch.attention_mask, batch_index) != 0

                computed = self._run_chunk(
                    layer,
                    jax.tree.map(lambda values: self._take(values, source), tokens),
                    chunk.position,
                    functools.partial(shape.attend, chunk, mask),
                )
                start, is_in_chunk = rows.offsets[first], jnp.arange(shape.tokens)
                is_in_chunk = is_in_chunk < chunk.num_tokens
                tokens = jax.tree.map(
                    lambda values, updates: _write(values, to_bits(updates), start, is_in_chunk),
                    tokens,
                    computed,
                )
                return first + chunk.num_rows, tokens

            first, tokens = jax.lax.while_loop(some_remain, run_chunk, (first, tokens))
        return tokens

    def _run_chunk(
        self,
        layer: Layer,
        tokens: Any,
        positions: Int[Array, " tokens"],
        attend: Callable[..., TokenHeads],
    ) -> Any:
        """Run the first part of a layer for the tokens of one chunk.

        Args:
            layer: the layer, from 0.
            tokens: the arrays of `PoolState.tokens` for these tokens.
            positions: the position of each token in its row.
            attend: (side inputs, query, keys, values) -> the attention of each token to its row.
        """
        num_inner = self.model.config.inner_group_num
        if not self.reads_first_token:
            for inner in range(num_inner):
                tokens = self._inner_layer(layer, inner, tokens, positions, attend)
            return tokens

        def finish_previous_layer(hidden, keys_values):
            side = self.side.of_layer(layer - 1)
            query = self._query(layer - 1, hidden, positions)
            return self._finish(layer - 1, hidden, attend(side, query, *keys_values))

        hidden, keys_values = tokens
        hidden = jax.lax.cond(
            layer > 0,
            finish_previous_layer,
            lambda hidden, keys_values: hidden,
            hidden,
            keys_values,
        )
        for inner in range(num_inner - 1):
            hidden = self._inner_layer(layer, inner, hidden, positions, attend)
        return hidden, self._keys_values(layer, hidden, positions)

    def _inner_layer(self, layer: Layer, inner: int, hidden: Tokens, positions, attend) -> Tokens:
        """Run one of the transformer layers of `layer`; only ALBERT may have several."""
        query = self._query(layer, hidden, positions, inner)
        keys_values = self._keys_values(layer, hidden, positions, inner)
        context = attend(self.side.of_layer(layer), query, *keys_values)
        return self._finish(layer, hidden, context, inner)

    def _query(self, layer: Layer, hidden: Tokens, positions, inner: int = -1) -> TokenHeads:
        return on_group(
            self.model,
            layer,
            lambda group, *operands: group.inner[inner].query(*operands),
            hidden,
            self.side.of_layer(layer),
            positions,
        )

    def _keys_values(self, layer: Layer, hidden: Tokens, positions, inner: int = -1):
        return on_group(
            self.model,
            layer,
            lambda group, *operands: group.inner[inner].keys_values(*operands),
            hidden,
            self.side.of_layer(layer),
            positions,
        )

    def _finish(self, layer: Layer, hidden: Tokens, context: TokenHeads, inner: int = -1):
        return on_group(
            self.model,
            layer,
            lambda group, hidden, context: group.inner[inner].finish(hidden, context),
            hidden,
            context,
        )

    def run_exits(
        self,
        layer: Layer,
        tokens: Any,
        rows: ActiveRows,
        starts: Int[Array, " rows"],
        exits: Int[Array, " rows"] | None = None,
    ) -> Float[Array, "rows classes"]:
        """Run the second part of a layer; return the logits in the order of `rows`.

        Args:
            layer: the layer, from 0.
            tokens: the arrays of all active rows.
            rows: the active rows.
            starts: where each row starts in `tokens`.
            exits: the exit of each row, from 0; absent, the exit of `layer`.
        """
        num_rows, sizes = len(self.batch.lengths), self.sizes.exit_rows
        # The last chunk may have rows beyond the last row.
        logits = zero_logits(self.model, jnp.pad(self.batch.lengths, (0, sizes[0])))
        carry = jnp.zeros_like(rows.num_rows), logits
        for size, rest in zip(sizes, run_while_more_than(sizes), strict=True):

            def some_remain(carry, rest=rest):
                return rows.num_rows - carry[0] > rest

            def run(carry, size=size):
                first, logits = carry
                chunk_logits = self._exit_logits(
                    layer,
                    tokens,
                    lengths=slices(rows.lengths, first, size),
                    offsets=slices(starts, first, size),
                    batch_offsets=slices(rows.batch_offsets, first, size),
                    exits=None if exits is None else slices(exits, first, size),
                )
                logits = jax.lax.dynamic_update_slice_in_dim(logits, chunk_logits, first, 0)
                return first + size, logits

            carry = jax.lax.while_loop(some_remain, run, carry)
        _, logits = carry
        return logits[:num_rows]

    def _exit_logits(self, layer, tokens, lengths, offsets, batch_offsets, exits):
        """Return the logits of some rows.

        Args:
            layer: the layer, from 0.
            tokens: the arrays of all active rows.
            lengths: the tokens of each row.
            offsets: where each row starts in `tokens`.
            batch_offsets: where each row starts in the batch.
            exits: the exit of each row, from 0; None for the exit of `layer`.
        """
        model, mask = self.model, self.batch.attention_mask

        def token_mask(index, is_token):
            return is_token & (take(mask, index - offsets[:, None] + batch_offsets[:, None]) != 0)

        if not self.reads_first_token:
            features = over_rows(
                self.sizes.lengths,
                lengths,
                offsets,
                lambda index, is_token: model.exit_features(
                    self._take(tokens, index), token_mask(index, is_token)
                ),
            )
            return self._classify(layer, exits, features)
        all_hidden, (keys, values) = tokens
        hidden = self._take(all_hidden, offsets)
        side = self.side.of_layer(layer)
        query = self._query(layer, hidden, jnp.zeros_like(offsets))
        context = over_rows(
            self.sizes.lengths,
            lengths,
            offsets,
            lambda index, is_token: attention(
                query[:, None],
                self._take(keys, index),
                self._take(values, index),
                token_mask(index, is_token),
                side,
            )[:, 0].astype(query.dtype),
        )
        first_token = self._finish(layer, hidden, context)[:, None]
        mask = jnp.ones_like(first_token[..., 0], bool)
        return self._classify(layer, exits, model.exit_features(first_token, mask))

    def _classify(
        self,
        layer: Layer,
        exits: Int[Array, " rows"] | None,
        features: Float[Array, "rows hidden"],
    ) -> Float[Array, "rows classes"]:
        if exits is None:
            return self.model.classify(layer, features)
        # All exits of all rows: less work than to read the parameters of an exit for every row.
        every_exit = jnp.arange(self.model.config.num_hidden_layers)
        by_exit = jax.vmap(self.model.classify, in_axes=(0, None))(every_exit, features)
        return by_exit[jnp.minimum(exits, every_exit[-1]), jnp.arange(len(features))]


def _write(
    values: Array, updates: Array, start: Int[Array, ""], is_in_chunk: Bool[Array, " tokens"]
) -> Array:
    """Write the tokens of a chunk to `start` and after it."""
    window = jax.lax.dynamic_slice_in_dim(values, start, len(updates))
    is_in_chunk = is_in_chunk.reshape(-1, *[1] * (updates.ndim - 1))
    window = jnp.where(is_in_chunk, updates, window)
    return jax.lax.dynamic_update_slice_in_dim(values, window, start, 0)
