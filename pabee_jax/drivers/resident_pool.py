"""A pool that stays on the device between calls: rows are admitted, advanced and answered.

The driver `pool` runs a batch until its last row has exited. A resident pool runs a few layers at a
time. Between two calls the host learns which rows have exited, and admits new rows. If all layers
share their parameters (ALBERT with one group), rows at different depths run together, so that rows
are admitted at any time ("continuous depth-wise batching", arXiv 2410.20672, for recursive
decoders). Otherwise all active rows are at one depth, and rows are admitted to an empty pool.

Every row has its own setting of the criterion.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pabee_jax.criteria import ExitCriterion
from pabee_jax.drivers.pool import PooledLayers, PoolState
from pabee_jax.drivers.ragged import RaggedBatch, active_rows, take
from pabee_jax.models.encoder import EarlyExitModel, full_precision


class ResidentRows(NamedTuple):
    """The rows of a resident pool, the longest first.

    Attributes:
        ticket: the number that the host has given to each row; -1 for rows that do not exist.
        lengths: the tokens of each row; 0 for rows that do not exist.
        attention_mask: the masks of all rows, one after the other.
        pool: the tokens of the active rows.
        layer: how many layers have run for each row.
        done: whether each row has exited or does not exist.
        criterion: the setting of each row: the leaves have the row axis first.
        criterion_state: the state of the criterion.
        answers: the logits with which each row has exited.
    """

    ticket: Int[Array, " rows"]
    lengths: Int[Array, " rows"]
    attention_mask: Int[Array, " tokens"]
    pool: PoolState
    layer: Int[Array, " rows"]
    done: Bool[Array, " rows"]
    criterion: ExitCriterion
    criterion_state: Any
    answers: Float[Array, "rows classes"]


def shares_all_layers(model: EarlyExitModel) -> bool:
    """Return whether rows at different depths can run together."""
    return len(model.groups) == 1


def empty(
    model: EarlyExitModel,
    criterion: ExitCriterion,
    *,
    max_rows: int,
    max_tokens: int,
    chunk_tokens: int,
    lengths: tuple[int, ...],
) -> ResidentRows:
    """Return a pool without rows.

    Args:
        model: the model.
        criterion: any setting of the criterion whose settings the rows will have.
        max_rows: the most rows.
        max_tokens: the most tokens of all rows.
        chunk_tokens, lengths: as for `pooled_early_exit`.
    """
    zero_rows = jnp.zeros(max_rows, jnp.int32)
    zero_tokens = jnp.zeros(max_tokens, jnp.int32)
    batch = _tokenless(zero_tokens, zero_rows)
    layers = PooledLayers(model, batch, chunk_tokens, lengths, model.side_inputs(lengths[-1]))
    criteria = jax.tree.map(lambda leaf: jnp.full(max_rows, leaf), criterion)
    answers = jnp.zeros((max_rows, model.config.num_labels), jnp.float32)
    return ResidentRows(
        ticket=zero_rows - 1,
        lengths=zero_rows,
        attention_mask=zero_tokens,
        pool=layers.embedded(),
        layer=zero_rows,
        done=zero_rows == 0,
        criterion=criteria,
        criterion_state=_initial_states(criteria, answers, zero_rows),
        answers=answers,
    )


def admit(
    model: EarlyExitModel,
    rows: ResidentRows,
    new: RaggedBatch,
    ticket: Int[Array, " new"],
    criterion: ExitCriterion,
    *,
    chunk_tokens: int,
    lengths: tuple[int, ...],
) -> ResidentRows:
    """Return the pool with new rows, without the rows that have exited.

    The active and the new rows, and their tokens, must fit into the pool. If the layers do not
    share their parameters, no row may be active.

    Args:
        model: the model.
        rows: the pool.
        new: the new rows; a row of 0 tokens does not exist.
        ticket: the number of each new row.
        criterion: the setting of each new row.
        chunk_tokens, lengths: as for `pooled_early_exit`.
    """
    layers = PooledLayers(model, new, chunk_tokens, lengths, model.side_inputs(lengths[-1]))
    embedded = layers.embedded()
    new_lengths, new_mask = jnp.asarray(new.lengths), jnp.asarray(new.attention_mask)
    is_new = new_lengths > 0
    if layers.reads_first_token:
        # Before an exit, a layer is only started.
        started = active_rows(new_lengths, embedded.starts, ~is_new)
        with full_precision(model.dtype):
            tokens = layers.run_tokens(jnp.int32(0), embedded.tokens, started)
        embedded = PoolState(tokens, embedded.starts)
    answers = jnp.zeros((len(ticket), rows.answers.shape[1]), jnp.float32)
    new_rows = ResidentRows(
        ticket=jnp.where(is_new, ticket, -1),
        lengths=new_lengths,
        attention_mask=new_mask,
        pool=embedded,
        layer=jnp.zeros_like(ticket),
        done=~is_new,
        criterion=criterion,
        criterion_state=_initial_states(criterion, answers, ticket),
        answers=answers,
    )
    return _merged(rows, new_rows)


def advance(
    model: EarlyExitModel,
    rows: ResidentRows,
    num_layers: Int[Array, ""] | int,
    *,
    chunk_tokens: int,
    lengths: tuple[int, ...],
) -> ResidentRows:
    """Return the pool after `num_layers` more layers, or when every row has exited.

    Args:
        model: the model.
        rows: the pool.
        num_layers: the layers to run, at least 1; it may be traced.
        chunk_tokens, lengths: as for `pooled_early_exit`.
    """
    batch = _tokenless(rows.attention_mask, rows.lengths)
    layers = PooledLayers(model, batch, chunk_tokens, lengths, model.side_inputs(lengths[-1]))
    mixed = shares_all_layers(model)

    def some_remain(carry):
        step, rows = carry
        return (step < num_layers) & ~jnp.all(rows.done)

    def run(carry):
        step, rows = carry
        # All active rows are at this depth, or all layers have the same parameters.
        depth = jnp.max(jnp.where(rows.done, 0, rows.layer))
        with full_precision(model.dtype):
            if layers.reads_first_token:
                active = active_rows(rows.lengths, rows.pool.starts, rows.done)
                exits = rows.layer[active.order] if mixed else None
                tokens = rows.pool.tokens
                logits = layers.run_exits(depth, tokens, active, active.sources, exits)
                rows = _with_exits(model, rows, active.in_batch_order(logits))
                active = active_rows(rows.lengths, rows.pool.starts, rows.done)
                tokens = layers.run_tokens(depth + 1, rows.pool.tokens, active)
                pool = PoolState(tokens, active.in_batch_order(active.offsets))
                rows = rows._replace(pool=pool)
            else:
                active = active_rows(rows.lengths, rows.pool.starts, rows.done)
                tokens = layers.run_tokens(depth, rows.pool.tokens, active)
                exits = rows.layer[active.order] if mixed else None
                logits = layers.run_exits(depth, tokens, active, active.offsets, exits)
                pool = PoolState(tokens, active.in_batch_order(active.offsets))
                rows = _with_exits(model, rows._replace(pool=pool), active.in_batch_order(logits))
        return step + 1, rows

    return jax.lax.while_loop(some_remain, run, (jnp.int32(0), rows))[1]


def _tokenless(attention_mask: Array, lengths: Array) -> RaggedBatch:
    """Return a batch of rows that are embedded already: only masks and lengths are used."""
    unused = attention_mask
    return RaggedBatch(unused, attention_mask, unused, unused, lengths)


def _with_exits(
    model: EarlyExitModel, rows: ResidentRows, logits: Float[Array, "rows classes"]
) -> ResidentRows:
    """Return the rows after the exit of their current layers, which gave `logits`."""

    def of_row(criterion, state, logits, layer):
        state = jax.tree.map(lambda leaf: leaf[None], state)
        state, exits = criterion.update(state, logits[None], layer)
        answer = criterion.answer(state, logits[None])
        return jax.tree.map(lambda leaf: leaf[0], (state, exits, answer))

    layer = jnp.where(rows.done, rows.layer, rows.layer + 1)
    state, wants_exit, answers = jax.vmap(of_row)(
        rows.criterion, rows.criterion_state, logits, layer
    )
    exits_now = ~rows.done & (wants_exit | (layer == model.config.num_hidden_layers))
    return rows._replace(
        layer=layer,
        done=rows.done | exits_now,
        criterion_state=state,
        answers=jnp.where(exits_now[:, None], answers, rows.answers),
    )


def _initial_states(criteria: ExitCriterion, zero_logits: Array, row: Array) -> Any:
    def of_row(criterion, zero_logits, row):
        state = criterion.init(zero_logits[None], row[None])
        return jax.tree.map(lambda leaf: leaf[0], state)

    return jax.vmap(of_row)(criteria, zero_logits, row)


def _merged(old: ResidentRows, new: ResidentRows) -> ResidentRows:
    """Return the active rows of both, the longest first, in arrays of the sizes of `old`."""
    row_lengths = jnp.concatenate([jnp.where(old.done, 0, old.lengths), new.lengths])
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
        for name in ("ticket", "layer", "criterion", "criterion_state", "answers")
    }
    return ResidentRows(
        lengths=sorted_lengths,
        attention_mask=tokens_of(
            old.attention_mask, new.attention_mask, old_mask_starts, new_mask_starts
        ),
        pool=PoolState(tokens, starts),
        done=sorted_lengths == 0,
        **per_row,
    )
