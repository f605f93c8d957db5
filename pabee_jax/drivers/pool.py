"""Driver `pool`: many rows walk the layers together, and only those that remain are computed.

After each layer the indices of the rows that remain move to the front (a stable partition); the
next layer runs just enough chunks for them. The hidden states themselves stay where they are: a
chunk gathers its rows, runs the layer and writes the rows back.

Where exits read the first token only, a row does not even pay for the whole of the layer at which
it leaves: that token needs the layer's keys and values of all tokens, a sixth of the layer, and the
rest of it for one token. So a chunk finishes the layer before, for the rows that stayed, and starts
this one.
"""

import functools
import itertools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pabee_jax.criteria import ExitCriterion
from pabee_jax.drivers.exit_rule import Exits
from pabee_jax.drivers.layer_loop import (
    CONTROL,
    Control,
    Layer,
    apply_layer,
    run_layers,
    zero_logits,
)
from pabee_jax.models.encoder import (
    Batch,
    EarlyExitModel,
    Hidden,
    KeysValues,
    Mask,
    Queries,
    attention_mask,
)

Carry = TypeVar("Carry")
# Of the layer that was started last: the hidden states that enter it, and their keys and values.
Started = tuple[Hidden, KeysValues]

# The rows that do not fill a chunk run in chunks of this share of one. On a CPU that took the loss
# to half-empty chunks from 14% to 3% (128 rows in chunks of 16, mean exit layer 4 of 12).
_REMAINDER_SHARE = 8


def pooled_early_exit(
    model: EarlyExitModel,
    batch: Batch,
    criterion: ExitCriterion,
    row: Int[Array, " batch"] | None = None,
    *,
    chunk_size: int,
    control: Control = CONTROL,
) -> Exits:
    """As `early_exit`, at a cost that is the sum of the rows' layers. To be used under `jit`.

    Args:
        chunk_size: rows that run together. The number of rows need not be a multiple of it.
    """
    batch = {name: jnp.asarray(values) for name, values in batch.items()}
    input_ids = batch["input_ids"]
    mask, config = attention_mask(batch), model.config
    # Made from the batch, so that it is sharded as the batch is.
    nothing = (0 * input_ids[:, :, None]).astype(model.dtype)
    hidden = jnp.broadcast_to(nothing, (*input_ids.shape, config.hidden_size))
    heads = (*input_ids.shape, config.num_attention_heads, -1)
    reads_first_token = config.exit_pooling == "cls"
    next_layer = _next_layer if reads_first_token else _whole_layer

    def embed_chunk(rows, hidden):
        part, _ = model.embed({name: _take(values, rows) for name, values in batch.items()})
        return _put(hidden, rows, part)

    def run_layer(layer, carried, done):
        def run_chunk(rows, carry):
            carried, logits = carry
            part_mask = _take(mask, rows)
            part = jax.tree.map(lambda values: _take(values, rows), carried)
            part, read = next_layer(model, layer, part, part_mask)
            part_logits = model.exit_logits(layer, read, part_mask)
            carried = jax.tree.map(lambda values, each: _put(values, rows, each), carried, part)
            return carried, _put(logits, rows, part_logits)

        return _in_chunks(~done, chunk_size, run_chunk, (carried, zero_logits(model, mask)))

    keys_values = (hidden.reshape(heads), hidden.reshape(heads))
    hidden = _in_chunks(jnp.any(mask, axis=1), chunk_size, embed_chunk, hidden)
    carried = (hidden, keys_values) if reads_first_token else hidden
    return run_layers(model, carried, mask, criterion, row, run_layer, control)


def _whole_layer(
    model: EarlyExitModel, layer: Layer, hidden: Hidden, mask: Mask
) -> tuple[Hidden, Hidden]:
    """The layer's output, to carry on and for the exit to read."""
    hidden = apply_layer(model, layer, hidden, mask)
    return hidden, hidden


def _next_layer(
    model: EarlyExitModel, layer: Layer, started: Started, mask: Mask
) -> tuple[Started, Queries]:
    """Finishes the layer before `layer` and starts `layer`; also its output for the first token."""

    def run(before, group, started, mask):
        hidden, keys_values = started
        if before is not None:
            hidden = model.finish_layer(model.groups[before], hidden, keys_values, mask)
        hidden, keys_values = model.start_layer(model.groups[group], hidden, mask)
        first = model.finish_layer(model.groups[group], hidden[:, :1], keys_values, mask)
        return (hidden, keys_values), first

    # A switch over what is distinct, as in `apply_layer`: (the group before or None, the group).
    steps = list(itertools.pairwise((None, *model.config.layer_groups)))
    distinct = list(dict.fromkeys(steps))
    branches = [functools.partial(run, *step) for step in distinct]
    index = [distinct.index(step) for step in steps]
    if isinstance(layer, int):
        return branches[index[layer]](started, mask)
    return jax.lax.switch(jnp.array(index)[layer], branches, started, mask)


def _in_chunks(
    remains: Bool[Array, " batch"],
    chunk_size: int,
    run_chunk: Callable[[Int[Array, " chunk"], Carry], Carry],
    carry: Carry,
) -> Carry:
    """Calls `run_chunk` with the indices of the rows that remain, `chunk_size` at a time.

    The last chunk is filled with rows that do not remain, and then with indices beyond the pool.
    """
    beyond = jnp.arange(len(remains), len(remains) + chunk_size)
    order = jnp.concatenate([jnp.argsort(~remains, stable=True), beyond])

    def run(start, stop, size, carry):
        def body(index, carry):
            return run_chunk(jax.lax.dynamic_slice_in_dim(order, start + index * size, size), carry)

        return jax.lax.fori_loop(0, (stop - start + size - 1) // size, body, carry)

    alive = jnp.sum(remains)
    whole = alive // chunk_size * chunk_size
    carry = run(0, whole, chunk_size, carry)
    return run(whole, alive, max(1, chunk_size // _REMAINDER_SHARE), carry)


def _take(values: Array, rows: Int[Array, " chunk"]) -> Array:
    return values.at[rows].get(mode="clip")


def _put(values: Array, rows: Int[Array, " chunk"], part: Array) -> Array:
    return values.at[rows].set(part, mode="drop", unique_indices=True)
