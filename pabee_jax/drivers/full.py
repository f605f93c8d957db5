"""Driver `full`: every layer runs and every exit answers. The test oracle of all other drivers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pabee_jax.drivers.exit_rule import Layer
from pabee_jax.models.encoder import Batch, EarlyExitModel
from pabee_jax.models.groups import LayerGroup
from pabee_jax.models.transformer import Hidden

# (hidden states, layer from 0, its parameters) -> (hidden states, logits of its exit)
Step = Callable[[Hidden, Layer, LayerGroup], tuple[Hidden, Array]]


def all_exit_logits(model: EarlyExitModel, batch: Batch) -> Float[Array, "exits batch classes"]:
    """Return the logits of every exit, for inference: without dropout."""
    hidden, mask, side = model.embed(batch)

    def step(hidden, layer, parameters):
        hidden = model.layer(parameters, hidden, mask, side.of_layer(layer))
        return hidden, model.exit_logits(layer, hidden, mask)

    return over_layers(model, step, hidden)


def over_layers(
    model: EarlyExitModel, step: Step, hidden: Hidden
) -> Float[Array, "exits batch classes"]:
    """Call `step` for every layer in turn, and return the logits of all exits.

    For stacked parameters the layers run under `scan`, so that compile time does not grow with
    depth.
    """
    config, groups = model.config, model.groups
    if not isinstance(groups, LayerGroup):
        logits = []
        for layer, group in enumerate(config.layer_groups):
            hidden, exit_logits = step(hidden, layer, groups[group])
            logits.append(exit_logits)
        return jnp.stack(logits)

    layers = jnp.arange(config.num_hidden_layers)
    if config.num_hidden_groups == config.num_hidden_layers:
        xs = (layers, groups)
        return jax.lax.scan(lambda hidden, x: step(hidden, *x), hidden, xs)[1]

    def shared_step(hidden, x):
        layer, group = x
        return step(hidden, layer, jax.tree.map(lambda leaf: leaf[group], groups))

    return jax.lax.scan(shared_step, hidden, (layers, jnp.array(config.layer_groups)))[1]
