"""What `loop` and `pool` share: the state between two layers, and when the walk ends."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pabee_jax.criteria import ExitCriterion
from pabee_jax.model import EarlyExitModel, Hidden, Mask

Layer = int | Int[Array, ""]
Exits = tuple[Int[Array, " batch"], Float[Array, "batch classes"]]
# (layer from 0, hidden states, done) -> (hidden states, logits of this layer's exit). The hidden
# states are whatever a driver carries. Rows that are done may come back with anything.
RunLayer = Callable[[Layer, Any, Bool[Array, " batch"]], tuple[Any, Array]]


class Control(NamedTuple):
    """How "does a row remain?" is compiled. The answers are the same; only time differs.

    Attributes:
        kind: "while", one `while_loop`; or "cond", a chain with one `cond` per layer, in which
            every layer's weights are known and no switch over the groups is needed.
        untested_layers: how many layers run before the question is asked for the first time.
    """

    kind: str = "while"
    untested_layers: int = 0


# What the measurements in docs/performance.md decided.
CONTROL = Control()


class WalkState(NamedTuple):
    """What one layer hands to the next.

    Attributes:
        layer: how many layers have run.
        hidden: what the driver carries from layer to layer, for the rows that are not done.
        criterion_state: for `Patience` the counter and the previous prediction.
        done: which rows have left.
        logits: the answer of the rows that have left.
        exit_layer: the layer (from 1) at which they left.
    """

    layer: Layer
    hidden: Any
    criterion_state: Any
    done: Bool[Array, " batch"]
    logits: Float[Array, "batch classes"]
    exit_layer: Int[Array, " batch"]


def walk(
    model: EarlyExitModel,
    hidden: Any,
    mask: Mask,
    criterion: ExitCriterion,
    row: Int[Array, " batch"] | None,
    run_layer: RunLayer,
    control: Control = CONTROL,
) -> Exits:
    """Runs layers until every row has left; each row's exit layer (from 1) and its logits there.

    A row in which nothing may be attended to (padding of the batch) counts as having left before
    the first layer, so that it keeps no other row waiting; its exit layer is 0.

    `row` is each row's index in the call, for the criterion; absent, its index in the batch.
    """
    num_layers = model.config.num_hidden_layers

    def some_row_remains(state: WalkState):
        return (state.layer < num_layers) & ~jnp.all(state.done)

    def step(state: WalkState) -> WalkState:
        hidden, logits = run_layer(state.layer, state.hidden, state.done)
        layer = state.layer + 1
        criterion_state, wants_exit = criterion.update(state.criterion_state, logits, layer)
        leaves = ~state.done & (wants_exit | (layer == num_layers))
        answers = criterion.answer(criterion_state, logits)
        return WalkState(
            layer=layer,
            hidden=hidden,
            criterion_state=criterion_state,
            done=state.done | leaves,
            logits=jnp.where(leaves[:, None], answers, state.logits),
            exit_layer=jnp.where(leaves, layer, state.exit_layer),
        )

    none = jnp.zeros_like(mask[:, 0], jnp.int32)
    nothing = no_logits(model, mask)
    row = jnp.arange(none.shape[0]) if row is None else row
    state = WalkState(
        layer=0,
        hidden=hidden,
        criterion_state=criterion.init(nothing, row),
        done=~jnp.any(mask, axis=1),
        logits=nothing,
        exit_layer=none,
    )
    for _ in range(min(control.untested_layers, num_layers)):
        state = step(state)
    if control.kind == "while":
        traced = state._replace(layer=jnp.int32(state.layer))
        state = jax.lax.while_loop(some_row_remains, step, traced)
    else:
        for layer in range(state.layer, num_layers):
            state = jax.lax.cond(
                jnp.all(state.done),
                lambda state: state,
                lambda state, layer=layer: step(state._replace(layer=layer)),
                state._replace(layer=jnp.int32(layer)),
            )
    return state.exit_layer, state.logits


def no_logits(model: EarlyExitModel, mask: Mask) -> Float[Array, "batch classes"]:
    """Zeros, derived from the batch so that they are sharded as the batch is."""
    return jnp.zeros_like(mask[:, :1], jnp.float32) * jnp.zeros(model.config.num_labels)


def apply_layer(model: EarlyExitModel, layer: Layer, hidden: Hidden, mask: Mask) -> Hidden:
    """Layer `layer` (from 0, traced or not).

    A switch over the distinct groups: indexing stacked weights would copy them every time.
    """
    if isinstance(layer, int) or len(model.groups) == 1:
        group = model.config.layer_groups[layer] if isinstance(layer, int) else 0
        return model.layer(model.groups[group], hidden, mask)
    branches = [
        lambda hidden, mask, group=group: model.layer(group, hidden, mask) for group in model.groups
    ]
    return jax.lax.switch(jnp.array(model.config.layer_groups)[layer], branches, hidden, mask)
