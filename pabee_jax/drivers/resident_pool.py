"""A pool that stays on the device between calls: rows are admitted, advanced and answered.

The driver `pool` runs a batch until its last row has exited. A resident pool runs a few layers at a
time. Between two calls the host learns which rows have exited, and admits new rows. If all layers
share their parameters (ALBERT with one group), rows at different depths run together, so that rows
are admitted at any time ("continuous depth-wise batching", arXiv 2410.20672, for recursive
decoders). Otherwise all active rows are at one depth, and rows are admitted to an empty pool.

Every row has its own setting of the criterion.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from pabee_jax.criteria import ExitCriterion, registered
from pabee_jax.criteria.base import Criterion
from pabee_jax.drivers import exit_rule
from pabee_jax.drivers.exit_rule import ExitState
from pabee_jax.drivers.layer_loop import zero_logits
from pabee_jax.drivers.pool import PooledLayers, PoolState
from pabee_jax.drivers.ragged import RaggedBatch, active_rows, take
from pabee_jax.drivers.shapes import ChunkSizes
from pabee_jax.models.encoder import EarlyExitModel, full_precision


class ResidentRows(NamedTuple):
    """The rows of a resident pool, the longest first.

    Attributes:
        ticket: the number that the host has given to each row; -1 for rows that do not exist.
        lengths: the tokens of each row; 0 for rows that do not exist.
        attention_mask: the masks of all rows, one after the other.
        pool: the tokens of the active rows.
        layer: how many layers have run for each row; they stop when the row exits.
        criterion: the setting of each row.
        exits: which rows have exited, where, and with which logits. A row that does not exist
            counts as having exited.
    """

    ticket: Int[Array, " rows"]
    lengths: Int[Array, " rows"]
    attention_mask: Int[Array, " tokens"]
    pool: PoolState
    layer: Int[Array, " rows"]
    criterion: "RowSettings"
    exits: ExitState


@registered()
@dataclasses.dataclass(frozen=True)
class RowSettings(Criterion):
    """A criterion with a setting for every row.

    Attributes:
        settings: the criterion, whose fields are arrays with the row axis first.
    """

    settings: Any

    def init(self, logits, row):
        return self._over_rows(lambda setting, *values: setting.init(*values), logits, row)

    def update(self, state, logits, layer):
        layer = jnp.broadcast_to(layer, logits.shape[:1])

        def update(setting, state, logits, layer):
            return setting.update(state, logits, layer[0])

        return self._over_rows(update, state, logits, layer)

    def answer(self, state, logits):
        return self._over_rows(lambda setting, *values: setting.answer(*values), state, logits)

    def _over_rows(self, function: Callable[..., Any], *values: Any) -> Any:
        """Call the function with the setting and the values of each row, as a batch of one."""

        def of_row(setting, *values):
            result = function(setting, *jax.tree.map(lambda leaf: leaf[None], values))
            return jax.tree.map(lambda leaf: leaf[0], result)

        return jax.vmap(of_row)(self.settings, *values)


def shares_all_layers(model: EarlyExitModel) -> bool:
    """Return whether rows at different depths can run together."""
    return len(model.groups) == 1


def empty(
    model: EarlyExitModel,
    criterion: ExitCriterion,
    *,
    max_rows: int,
    max_tokens: int,
    sizes: ChunkSizes,
) -> ResidentRows:
    """Return a pool without rows.

    Args:
        model: the model.
        criterion: any setting of the criterion whose settings the rows will have.
        max_rows: the most rows.
        max_tokens: the most tokens of all rows.
        sizes: the sizes of chunks.
    """
    zero_rows = jnp.zeros(max_rows, jnp.int32)
    zero_tokens = jnp.zeros(max_tokens, jnp.int32)
    batch = _tokenless(zero_tokens, zero_rows)
    layers = PooledLayers.of(model, batch, sizes)

    def for_rows(leaf: ArrayLike) -> Array:
        return jnp.broadcast_to(leaf, (max_rows, *jnp.shape(leaf)))

    settings = RowSettings(jax.tree.map(for_rows, criterion))
    return ResidentRows(
        ticket=zero_rows - 1,
        lengths=zero_rows,
        attention_mask=zero_tokens,
        pool=layers.embedded(),
        layer=zero_rows,
        criterion=settings,
        exits=_no_exits(model, settings, zero_rows, zero_rows == 0),
    )


def admit(
    model: EarlyExitModel,
    rows: ResidentRows,
    new: RaggedBatch,
    ticket: Int[Array, " new"],
    criterion: ExitCriterion,
    *,
    sizes: ChunkSizes,
) -> ResidentRows:
    """Return the pool with new rows, without the rows that have exited.

    The active and the new rows, and their tokens, must fit into the pool. If the layers do not
    share their parameters, no row may be active.

    Args:
        model: the model.
        rows: the pool.
        new: the new rows; a row of 0 tokens does not exist.
        ticket: the number of each new row.
        criterion: the setting of each new row: a criterion whose fields have the row axis first.
        sizes: the sizes of chunks.
    """
    layers = PooledLayers.of(model, new, sizes)
    embedded = layers.embedded()
    new_lengths, new_mask = jnp.asarray(new.lengths), jnp.asarray(new.attention_mask)
    is_new = new_lengths > 0
    if layers.reads_first_token:
        # Before an exit, a layer is only started.
        started = active_rows(new_lengths, embedded.starts, ~is_new)
        with full_precision(model.dtype):
            tokens = layers.run_tokens(jnp.int32(0), embedded.tokens, started)
        embedded = PoolState(tokens, embedded.starts)
    settings = RowSettings(criterion)
    new_rows = ResidentRows(
        ticket=jnp.where(is_new, ticket, -1),
        lengths=new_lengths,
        attention_mask=new_mask,
        pool=embedded,
        layer=jnp.zeros_like(ticket),
        criterion=settings,
        exits=_no_exits(model, settings, ticket, ~is_new),
    )
    return _merged(rows, new_rows)


def advance(
    model: EarlyExitModel,
    rows: ResidentRows,
    num_layers: Int[Array, ""] | int,
    *,
    sizes: ChunkSizes,
) -> ResidentRows:
    """Return the pool after `num_layers` more layers, or when every row has exited.

    Args:
        model: the model.
        rows: the pool.
        num_layers: the layers to run, at least 1; it may be traced.
        sizes: the sizes of chunks.
    """
    batch = _tokenless(rows.attention_mask, rows.lengths)
    layers = PooledLayers.of(model, batch, sizes)
    mixed = shares_all_layers(model)

    def some_remain(carry):
        step, rows = carry
        return (step < num_layers) & ~jnp.all(rows.exits.done)

    def run(carry):
        step, rows = carry
        done, starts, tokens = rows.exits.done, rows.pool.starts, rows.pool.tokens
        # All active rows are at this depth, or all layers have the same parameters.
        depth = jnp.max(jnp.where(done, 0, rows.layer))
        active = active_rows(rows.lengths, starts, done)
        exits = rows.layer[active.order] if mixed else None
        with full_precision(model.dtype):
            if layers.reads_first_token:  # The layer has been started.
                logits = layers.run_exits(depth, tokens, active, active.sources, exits)
                rows = _with_exits(model, rows, active.in_batch_order(logits))
                active = active_rows(rows.lengths, starts, rows.exits.done)
                tokens = layers.run_tokens(depth + 1, tokens, active)
            else:
                tokens = layers.run_tokens(depth, tokens, active)
                logits = layers.run_exits(depth, tokens, active, active.offsets, exits)
                rows = _with_exits(model, rows, active.in_batch_order(logits))
        pool = PoolState(tokens, active.in_batch_order(active.offsets))
        return step + 1, rows._replace(pool=pool)

    return jax.lax.while_loop(some_remain, run, (jnp.int32(0), rows))[1]


def _tokenless(attention_mask: Array, lengths: Array) -> RaggedBatch:
    """Return a batch of rows that are embedded already: only masks and lengths are used."""
    unused = attention_mask
    return RaggedBatch(unused, attention_mask, unused, unused, lengths)


def _no_exits(
    model: EarlyExitModel, criterion: RowSettings, row: Array, done: Bool[Array, " rows"]
) -> ExitState:
    return exit_rule.initial_state(criterion, zero_logits(model, done), row, done)


def _with_exits(
    model: EarlyExitModel, rows: ResidentRows, logits: Float[Array, "rows classes"]
) -> ResidentRows:
    """Return the rows after the exits of their current layers, which gave `logits`."""
    layer = jnp.where(rows.exits.done, rows.layer, rows.layer + 1)
    num_layers = model.config.num_hidden_layers
    exits = exit_rule.apply(rows.criterion, rows.exits, logits, layer, num_layers)
    return rows._replace(layer=layer, exits=exits)


def _merged(old: ResidentRows, new: ResidentRows) -> ResidentRows:
    """Return the active rows of both, the longest first, in arrays of the sizes of `old`."""
    row_lengths = jnp.concatenate([jnp.where(old.exits.done, 0, old.lengths), new.lengths])
    order = jnp.argsort(-row_lengths, stable=True)[: len(old.lengths)]
    sorted_lengths = row_lengths[order]
    ends = jnp.cumsum(sorted_lengths)
    starts = ends - sorted_lengths
    size = len(old.attention_mask)
    slots = jnp.arange(size)
    row = jnp.searchsorted(ends, slots, side="right", method="scan_unrolled")
    row = jnp.clip(row, 0, len(ends) - 1)
    position = slots - starts[row]

    def tokens_of(old_values, new_values, old_starts, new_starts):
        source = jnp.concatenate([old_starts, new_starts + len(old_values)])[order]
        values = jnp.concatenate([old_values, new_values])
        moved = take(values, source[row] + position)
        return jnp.concatenate([moved, jnp.zeros_like(old_values[size:])])

    def rows_of(old_values, new_values):
        return jnp.concatenate([old_values, new_values])[order]

    old_mask_starts, new_mask_starts = (
        jnp.cumsum(rows.lengths) - rows.lengths for rows in (old, new)
    )
    tokens = jax.tree.map(
        lambda ours, theirs: tokens_of(ours, theirs, old.pool.starts, new.pool.starts),
        old.pool.tokens,
        new.pool.tokens,
    )
    per_row = {
        name: jax.tree.map(rows_of, getattr(old, name), getattr(new, name))
        for name in ("ticket", "layer", "criterion", "exits")
    }
    exits = per_row.pop("exits")._replace(done=sorted_lengths == 0)
    return ResidentRows(
        lengths=sorted_lengths,
        attention_mask=tokens_of(
            old.attention_mask, new.attention_mask, old_mask_starts, new_mask_starts
        ),
        pool=PoolState(tokens, starts),
        exits=exits,
        **per_row,
    )
