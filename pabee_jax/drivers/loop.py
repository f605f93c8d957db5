"""Driver `loop`: one compiled `while_loop` that stops when every row of the batch has left."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pabee_jax.criteria import ExitCriterion
from pabee_jax.model import Batch, EarlyExitModel


class LoopState(NamedTuple):
    """What one iteration hands to the next.

    Attributes:
        layer: how many layers have run.
        hidden: output of the last layer that ran. Rows that left go on being computed: nothing
            reads them, and freezing them would cost a copy.
        criterion_state: for `Patience` the counter and the previous prediction.
        done: which rows have left.
        logits: the answer of the rows that have left.
        exit_layer: the layer (from 1) at which they left.
    """

    layer: Int[Array, ""]
    hidden: Float[Array, "batch seq hidden"]
    criterion_state: Any
    done: Bool[Array, " batch"]
    logits: Float[Array, "batch classes"]
    exit_layer: Int[Array, " batch"]


def early_exit(
    model: EarlyExitModel, batch: Batch, criterion: ExitCriterion
) -> tuple[Int[Array, " batch"], Float[Array, "batch classes"]]:
    """Each row's exit layer (from 1) and the logits of that exit. To be used under `jit`.

    A row in which nothing may be attended to (padding of the batch) counts as having left before
    the first layer, so that it keeps no other row waiting; its exit layer is 0.
    """
    config = model.config
    hidden, mask = model.embed(batch)
    groups = jnp.array(config.layer_groups)
    branches = [
        lambda hidden, group=group: model.layer(group, hidden, mask) for group in model.groups
    ]

    def run_layer(layer, hidden):
        # A switch over the distinct groups: indexing stacked weights would copy them every time.
        if len(branches) == 1:
            return branches[0](hidden)
        return jax.lax.switch(groups[layer], branches, hidden)

    def some_row_remains(state: LoopState):
        return (state.layer < config.num_hidden_layers) & ~jnp.all(state.done)

    def step(state: LoopState) -> LoopState:
        hidden = run_layer(state.layer, state.hidden)
        logits = model.exit_logits(state.layer, hidden, mask)
        layer = state.layer + 1
        criterion_state, wants_exit = criterion.update(state.criterion_state, logits, layer)
        leaves = ~state.done & (wants_exit | (layer == config.num_hidden_layers))
        return LoopState(
            layer=layer,
            hidden=hidden,
            criterion_state=criterion_state,
            done=state.done | leaves,
            logits=jnp.where(leaves[:, None], logits, state.logits),
            exit_layer=jnp.where(leaves, layer, state.exit_layer),
        )

    # Derived from the batch, so that it is sharded as the batch is.
    no_logits = jnp.zeros_like(hidden[:, 0, :1], jnp.float32) * jnp.ones(config.num_labels)
    rows = jnp.arange(hidden.shape[0])
    start = LoopState(
        layer=jnp.int32(0),
        hidden=hidden,
        criterion_state=criterion.init(no_logits, rows),
        done=~jnp.any(mask, axis=1),
        logits=no_logits,
        exit_layer=jnp.zeros_like(rows, jnp.int32),
    )
    final = jax.lax.while_loop(some_row_remains, step, start)
    return final.exit_layer, final.logits
