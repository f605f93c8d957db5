"""Driver `pool`: runs many rows layer by layer and computes only the rows that have not exited.

The rows have different lengths and no padding: the pool keeps the tokens of the active rows (the
rows that have not exited) in flat arrays. A layer consists of what it does to single tokens, chunk
by chunk (`ragged`), and of attention, block by block of rows (`row_tokens`). Its first pass over
the tokens moves the active rows together, so that they stay in order and without gaps.

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
from pabee_jax.drivers.layer_loop import (
    CONTROL,
    Control,
    Layer,
    copied_group,
    on_group,
    run_layers,
    zero_logits,
)
from pabee_jax.drivers.ragged import (
    ActiveRows,
    RaggedBatch,
    active_rows,
    map_tokens,
    read,
    slices,
    store,
)
from pabee_jax.drivers.row_tokens import STEP, Attention, RowTokens
from pabee_jax.drivers.shapes import ChunkSizes, run_while_more_than
from pabee_jax.models.encoder import EarlyExitModel, full_precision
from pabee_jax.models.side_inputs import SideInputs


class PoolTokens(NamedTuple):
    """Flat arrays of the tokens of rows, as `store` returns them.

    Attributes:
        hidden: the hidden states; with CLS pooling, the input of the layer that was started.
        query: the attention queries, and then what attention returns in their place. They are not
            used by a later layer.
        keys, values: with CLS pooling, those of the layer that was started; otherwise they are not
            used by a later layer.
    """

    hidden: Array
    query: Array
    keys: Array
    values: Array


class PoolState(NamedTuple):
    """What the pool carries from layer to layer.

    Attributes:
        tokens: the tokens of the rows that were active in the last layer.
        starts: where the tokens of each row of the batch start in these arrays.
    """

    tokens: PoolTokens
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
    pool = PooledLayers.of(model, batch, sizes)
    done = batch.lengths == 0
    return run_layers(model, pool.embedded(), done, criterion, row, pool.run_layer, control)


def pooled_all_exit_logits(
    model: EarlyExitModel, batch: RaggedBatch, *, sizes: ChunkSizes
) -> Float[Array, "exits rows classes"]:
    """Return the same as `all_exit_logits`, without padding; zeros for a row without tokens.

    Args:
        model, batch, sizes: as for `pooled_early_exit`.
    """
    pool = PooledLayers.of(model, batch, sizes)
    layers, done = jnp.arange(model.config.num_hidden_layers), batch.lengths == 0
    return jax.lax.scan(
        lambda state, layer: pool.run_layer(layer, state, done), pool.embedded(), layers
    )[1]


@dataclasses.dataclass(frozen=True)
class PooledLayers:
    """The layers of a model over a ragged batch."""

    model: EarlyExitModel
    batch: RaggedBatch
    sizes: ChunkSizes
    side: SideInputs

    @classmethod
    def of(cls, model: EarlyExitModel, batch: RaggedBatch, sizes: ChunkSizes) -> "PooledLayers":
        """Return the layers, with the side inputs for the longest row."""
        return cls(model, batch, sizes, model.side_inputs(-(-sizes.longest // STEP) * STEP))

    @property
    def reads_first_token(self) -> bool:
        """Whether exits read the first token, so that a layer is only started before an exit."""
        return self.model.config.exit_pooling == "cls"

    def embedded(self) -> PoolState:
        """Return the state before the first layer."""
        batch, config = self.batch, self.model.config
        num_tokens, chunk = jnp.sum(batch.lengths), self.sizes.tokens[0]
        # A chunk or a block may extend beyond the last token.
        size = len(batch.input_ids) + max(chunk, self.sizes.block_tokens)

        def zeros(*shape: int) -> Array:
            # Derived from the batch, so that the arrays are sharded as the batch is.
            zero = store(0 * num_tokens, self.model.dtype)
            return jnp.broadcast_to(zero, (size, *shape))

        def embed_chunk(index, hidden):
            names = (batch.input_ids, batch.token_type_ids, batch.positions)
            ids, segments, positions = (slices(values, index * chunk, chunk) for values in names)
            embedded = self.model.embeddings(ids, segments, positions)
            embedded = store(embedded, self.model.dtype)
            return jax.lax.dynamic_update_slice_in_dim(hidden, embedded, index * chunk, 0)

        with full_precision(self.model.dtype):
            chunks = (num_tokens + chunk - 1) // chunk
            hidden = jax.lax.fori_loop(0, chunks, embed_chunk, zeros(config.hidden_size))
        heads = config.num_attention_heads
        of_heads = [zeros(heads, config.hidden_size // heads) for _ in range(3)]
        tokens = PoolTokens(hidden, *of_heads)
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

    def _read(self, stored: Array, index: Array) -> Array:
        return read(stored, index, self.model.dtype)

    def run_tokens(self, layer: Layer, tokens: PoolTokens, rows: ActiveRows) -> PoolTokens:
        """Run the first part of a layer; return the tokens of the active rows at their offsets."""
        starts, num_inner = rows.sources, self.model.config.inner_group_num
        if self.reads_first_token:
            tokens = self._finish_previous_layer(layer, tokens, rows)
            starts, num_inner = rows.offsets, num_inner - 1
        call = self._with_parameters_of(layer)
        for inner in range(num_inner):
            tokens = self._run_inner(call, inner, layer, tokens, rows, starts)
            starts = rows.offsets
        if not self.reads_first_token:
            return tokens
        side = self.side.of_layer(layer)

        def start(tokens, positions):
            keys, values = call(
                lambda group, *operands: group.inner[-1].keys_values(*operands),
                tokens.hidden,
                side,
                positions,
            )
            return {"keys": keys, "values": values}

        return self._map(start, tokens, rows, rows.offsets)

    def _finish_previous_layer(
        self, layer: Layer, tokens: PoolTokens, rows: ActiveRows
    ) -> PoolTokens:
        """Finish the layer before `layer`, of which `tokens` has the keys and values."""
        # Layer 0 has no previous layer: the loops run over no rows. No row has moved yet.
        num_rows, num_tokens = (
            jnp.where(layer > 0, count, jnp.zeros_like(count))
            for count in (rows.num_rows, rows.num_tokens)
        )
        started = rows._replace(num_rows=num_rows, num_tokens=num_tokens)
        previous = jnp.maximum(layer - 1, 0)
        call = self._with_parameters_of(previous)
        return self._run_inner(
            call, -1, previous, tokens, started, rows.sources, has_keys_values=True
        )

    def _with_parameters_of(self, layer: Layer) -> Callable[..., Any]:
        """Return a function that calls `function(group, *operands)` with a layer's parameters."""
        if not self.sizes.copies_parameters:
            return functools.partial(on_group, self.model, layer)
        group = copied_group(self.model, layer)
        return lambda function, *operands: function(group, *operands)

    def _map(self, function, tokens: PoolTokens, rows: ActiveRows, starts: Array) -> PoolTokens:
        return map_tokens(function, tokens, rows, starts, self.sizes.tokens, self.model.dtype)

    def _run_inner(
        self,
        call: Callable[..., Any],
        inner: int,
        layer: Layer,
        tokens: PoolTokens,
        rows: ActiveRows,
        starts: Int[Array, " rows"],
        has_keys_values: bool = False,
    ) -> PoolTokens:
        """Run one of the transformer layers of `layer`; only ALBERT may have several.

        Args:
            call: the result of `_with_parameters_of(layer)`.
            inner: the index of the transformer layer.
            layer: the layer, from 0.
            tokens: the tokens.
            rows: the active rows.
            starts: where they start in `tokens`.
            has_keys_values: whether `tokens` has the keys and values of this layer.
        """
        side, dtype = self.side.of_layer(layer), self.model.dtype

        def project(tokens, positions):
            def in_group(group, *operands):
                layer = group.inner[inner]
                query = layer.query(*operands)
                return (query,) if has_keys_values else (query, *layer.keys_values(*operands))

            query, *new = call(in_group, tokens.hidden, side, positions)
            keys, values = new or (tokens.keys, tokens.values)
            return {"hidden": tokens.hidden, "query": query, "keys": keys, "values": values}

        def finish(tokens, positions):
            del positions
            hidden = call(
                lambda group, *operands: group.inner[inner].finish(*operands),
                tokens.hidden,
                tokens.query,
            )
            return {"hidden": hidden}

        tokens = self._map(project, tokens, rows, starts)
        attend = Attention(self.sizes.block_tokens, self.sizes.lengths)
        mask = jnp.asarray(self.batch.attention_mask)
        context = attend(tokens.query, tokens.keys, tokens.values, rows, mask, side, dtype)
        return self._map(finish, tokens._replace(query=context), rows, rows.offsets)

    def run_exits(
        self,
        layer: Layer,
        tokens: PoolTokens,
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
        call = self._with_parameters_of(layer) if self.reads_first_token else None
        for size, rest in zip(sizes, run_while_more_than(sizes), strict=True):

            def some_remain(carry, rest=rest):
                return rows.num_rows - carry[0] > rest

            def run(carry, size=size):
                first, logits = carry
                chunk_logits = self._exit_logits(
                    call,
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

    def _exit_logits(self, call, layer, tokens, lengths, offsets, batch_offsets, exits):
        """Return the logits of some rows.

        Args:
            call: the result of `_with_parameters_of(layer)`.
            layer: the layer, from 0.
            tokens: the arrays of all active rows.
            lengths: the tokens of each row.
            offsets: where each row starts in `tokens`.
            batch_offsets: where each row starts in the batch.
            exits: the exit of each row, from 0; None for the exit of `layer`.
        """
        mask = jnp.asarray(self.batch.attention_mask)
        of_rows = RowTokens(lengths, offsets, batch_offsets, mask)
        if not self.reads_first_token:
            features = of_rows.mean(
                self.model.config.hidden_size,
                lambda index: self.model.exit_hidden(self._read(tokens.hidden, index)),
            )
            return self._classify(layer, exits, features)
        hidden, side = self._read(tokens.hidden, offsets), self.side.of_layer(layer)
        query = call(
            lambda group, *operands: group.inner[-1].query(*operands),
            hidden,
            side,
            jnp.zeros_like(offsets),
        )
        context = of_rows.attention_of_first_tokens(
            query,
            lambda index: (self._read(tokens.keys, index), self._read(tokens.values, index)),
            side,
        )
        hidden = call(
            lambda group, *operands: group.inner[-1].finish(*operands),
            hidden,
            context.astype(hidden.dtype),
        )
        return self._classify(layer, exits, self.model.exit_hidden(hidden))

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
