"""The exit rule: the one place that decides "this row exits at this layer".

`layer_loop.run_layers` (drivers `loop` and `pool`), the resident pool and `replay` call `apply`, so
that they cannot disagree.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pabee_jax.criteria import ExitCriterion

Layer = int | Int[Array, ""]
Exits = tuple[Int[Array, " batch"], Float[Array, "batch classes"]]


class ExitState(NamedTuple):
    """The exits so far: which rows have exited, at which layer, and with which logits.

    Attributes:
        criterion_state: for `Patience` the counter and the previous prediction.
        done: whether each row has exited.
        exit_layer: the layer (from 1) at which each row exited; 0 if it has not.
        logits: the logits with which each row exited; zeros if it has not.
    """

    criterion_state: Any
    done: Bool[Array, " batch"]
    exit_layer: Int[Array, " batch"]
    logits: Float[Array, "batch classes"]


def initial_state(
    criterion: ExitCriterion,
    zero_logits: Float[Array, "batch classes"],
    row: Int[Array, " batch"],
    done: Bool[Array, " batch"],
) -> ExitState:
    """Return the state before layer 1.

    Args:
        criterion: decides which rows exit.
        zero_logits: zeros, derived from the batch so that the state is sharded as the batch is.
        row: each row's index in the call.
        done: rows that take no part, such as padding rows of a batch.
    """
    exit_layer = jnp.zeros_like(zero_logits[:, 0], jnp.int32)
    return ExitState(criterion.init(zero_logits, row), done, exit_layer, zero_logits)


def apply(
    criterion: ExitCriterion,
    state: ExitState,
    logits: Float[Array, "batch classes"],
    layer: Layer | Int[Array, " batch"],
    num_layers: int,
) -> ExitState:
    """Return the state after `layer` (from 1, possibly traced), whose exit gave `logits`.

    If rows are at different depths, `layer` has the layer of each row.

    A row exits at the first layer at which the criterion says so, and at the last layer in any
    case. A row that has exited keeps its exit layer and its logits.
    """
    criterion_state, wants_exit = criterion.update(state.criterion_state, logits, layer)
    exits_now = ~state.done & (wants_exit | (layer == num_layers))
    answer = criterion.answer(criterion_state, logits)
    return ExitState(
        criterion_state=criterion_state,
        done=state.done | exits_now,
        exit_layer=jnp.where(exits_now, layer, state.exit_layer),
        logits=jnp.where(exits_now[:, None], answer, state.logits),
    )
