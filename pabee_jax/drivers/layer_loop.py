"""The loop over layers that drivers `loop` and `pool` share: run a layer, apply the exit rule."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pabee_jax.criteria import ExitCriterion
from pabee_jax.drivers import exit_rule
from pabee_jax.drivers.exit_rule import Exits, ExitState, Layer
from pabee_jax.models.encoder import EarlyExitModel
from pabee_jax.models.transformer import Hidden, Mask

# (layer from 0, hidden states, done) -> (hidden states, logits of this layer's exit). The hidden
# states are a pytree that the driver chooses. The values of rows that are done are not used.
RunLayer = Callable[[Layer, Any, Bool[Array, " batch"]], tuple[Any, Array]]


class Control(NamedTuple):
    """How the test "has every row exited?" is compiled. It changes time, never results.

    Attributes:
        kind: "while", one `while_loop`; or "cond", a chain with one `cond` per layer, in which
            every layer's weights are known and no switch over the groups is needed.
        untested_layers: how many layers run before the first test.
    """

    kind: str = "while"
    untested_layers: int = 0


# The fastest in the measurements of docs/performance.md.
CONTROL = Control()


class LoopState(NamedTuple):
    """The carry of the loop.

    Attributes:
        layer: how many layers have run.
        hidden: the arrays that the driver carries from layer to layer; valid for rows not done.
        exits: which rows have exited, where, and with which logits.
    """

    layer: Layer
    hidden: Any
    exits: ExitState


def run_layers(
    model: EarlyExitModel,
    hidden: Any,
    mask: Mask,
    criterion: ExitCriterion,
    row: Int[Array, " batch"] | None,
    run_layer: RunLayer,
    control: Control = CONTROL,
) -> Exits:
    """Run layers until every row has exited; return each row's exit layer (from 1) and logits.

    A row whose mask is all zeros (padding of the batch) counts as having exited before the first
    layer, so that no other row waits for it; its exit layer is 0.

    `row` is each row's index in the call, for the criterion; absent, its index in the batch.
    """
    num_layers = model.config.num_hidden_layers

    def some_row_remains(state: LoopState):
        return (state.layer < num_layers) & ~jnp.all(state.exits.done)

    def step(state: LoopState) -> LoopState:
        hidden, logits = run_layer(state.layer, state.hidden, state.exits.done)
        layer = state.layer + 1
        exits = exit_rule.apply(criterion, state.exits, logits, layer, num_layers)
        return LoopState(layer, hidden, exits)

    row = jnp.arange(mask.shape[0]) if row is None else row
    exits = exit_rule.initial_state(
        criterion, zero_logits(model, mask), row, done=~jnp.any(mask, axis=1)
    )
    state = LoopState(0, hidden, exits)
    for _ in range(min(control.untested_layers, num_layers)):
        state = step(state)
    if control.kind == "while":
        traced = state._replace(layer=jnp.int32(state.layer))
        state = jax.lax.while_loop(some_row_remains, step, traced)
    else:
        for layer in range(state.layer, num_layers):
            state = jax.lax.cond(
                jnp.all(state.exits.done),
                lambda state: state,
                lambda state, layer=layer: step(state._replace(layer=layer)),
                state._replace(layer=jnp.int32(layer)),
            )
    return state.exits.exit_layer, state.exits.logits


def zero_logits(model: EarlyExitModel, mask: Mask) -> Float[Array, "batch classes"]:
    """Return zeros, derived from the batch so that they are sharded as the batch is."""
    return jnp.zeros_like(mask[:, :1], jnp.float32) * jnp.zeros(model.config.num_labels)


def apply_layer(model: EarlyExitModel, layer: Layer, hidden: Hidden, mask: Mask) -> Hidden:
    """Run layer `layer` (from 0, traced or not).

    A traced layer becomes a switch over the distinct groups: indexing stacked weights with a traced
    index would copy them at every layer.
    """
    if isinstance(layer, int) or len(model.groups) == 1:
        group = model.config.layer_groups[layer] if isinstance(layer, int) else 0
        return model.layer(model.groups[group], hidden, mask)
    branches = [
        lambda hidden, mask, group=group: model.layer(group, hidden, mask) for group in model.groups
    ]
    return jax.lax.switch(jnp.array(model.config.layer_groups)[layer], branches, hidden, mask)
