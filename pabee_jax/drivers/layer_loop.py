"""The loop over layers that drivers `loop` and `pool` share: run a layer, apply the exit rule."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pabee_jax.criteria import ExitCriterion
from pabee_jax.drivers import exit_rule
from pabee_jax.drivers.exit_rule import Exits, ExitState, Layer
from pabee_jax.models.encoder import EarlyExitModel
from pabee_jax.models.groups import LayerGroup

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
    done: Bool[Array, " batch"],
    criterion: ExitCriterion,
    row: Int[Array, " batch"] | None,
    run_layer: RunLayer,
    control: Control = CONTROL,
) -> Exits:
    """Run layers until every row has exited; return each row's exit layer (from 1) and logits.

    Args:
        model: the model.
        hidden: the arrays before the first layer, as `run_layer` takes them.
        done: rows that take no part, such as padding rows of a batch; their exit layer is 0.
        criterion: decides which rows exit.
        row: each row's index in the call, for the criterion; absent, its index in the batch.
        run_layer: runs one layer.
        control: how the test "has every row exited?" is compiled.
    """
    num_layers = model.config.num_hidden_layers

    def some_row_remains(state: LoopState):
        return (state.layer < num_layers) & ~jnp.all(state.exits.done)

    def step(state: LoopState) -> LoopState:
        hidden, logits = run_layer(state.layer, state.hidden, state.exits.done)
        layer = state.layer + 1
        exits = exit_rule.apply(criterion, state.exits, logits, layer, num_layers)
        return LoopState(layer, hidden, exits)

    row = jnp.arange(done.shape[0]) if row is None else row
    exits = exit_rule.initial_state(criterion, zero_logits(model, done), row, done)
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


def zero_logits(model: EarlyExitModel, per_row: Array) -> Float[Array, "batch classes"]:
    """Return zeros, derived from an array with one value per row so that they are sharded as it."""
    return jnp.zeros_like(per_row[:, None], jnp.float32) * jnp.zeros(model.config.num_labels)


def on_group(
    model: EarlyExitModel, layer: Layer, function: Callable[..., Any], *operands: Any
) -> Any:
    """Return `function(group, *operands)` for the parameters of `layer` (from 0, traced or not).

    A traced layer becomes a switch over the distinct groups: indexing stacked weights with a traced
    index would copy them at every layer.
    """
    groups, layer_groups = model.groups, model.config.layer_groups
    if isinstance(layer, int) or len(groups) == 1:
        group = layer_groups[layer] if isinstance(layer, int) else 0
        return function(groups[group], *operands)
    branches = [functools.partial(function, group) for group in groups]
    return jax.lax.switch(jnp.array(layer_groups)[layer], branches, *operands)


def copied_group(model: EarlyExitModel, layer: Layer) -> LayerGroup:
    """Return the parameters of `layer` (from 0, traced or not); for a traced layer, a copy.

    Against `on_group`, a function is compiled once and not once per group.
    """
    groups, layer_groups = model.groups, model.config.layer_groups
    if isinstance(layer, int) or len(groups) == 1:
        return groups[layer_groups[layer] if isinstance(layer, int) else 0]
    branches = [lambda group=group: group for group in groups]
    return jax.lax.switch(jnp.array(layer_groups)[layer], branches)
