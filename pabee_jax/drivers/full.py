"""Driver `full`: every layer runs and every exit answers. The oracle of all other drivers."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from pabee_jax.model import Batch, EarlyExitModel


def all_exit_logits(
    model: EarlyExitModel, batch: Batch, key: Key[Array, ""] | None = None
) -> Float[Array, "exits batch classes"]:
    """Logits of every exit; with a key, dropout is active (training).

    The dropout of layer i depends on `key` and i only.
    """
    config = model.config
    layers = jnp.arange(config.num_hidden_layers)

    def layer_keys(layer):
        if key is None:
            return None, None
        return jax.random.split(jax.random.fold_in(key, layer + 1))

    def step(hidden, layer, parameters):
        layer_key, exit_key = layer_keys(layer)
        hidden = model.layer(parameters, hidden, mask, layer_key)
        return hidden, model.exit_logits(layer, hidden, mask, exit_key)

    hidden, mask = model.embed(batch, None if key is None else jax.random.fold_in(key, 0))
    if not model.is_stacked:
        logits = []
        for layer, group in enumerate(config.layer_groups):
            hidden, exit_logits = step(hidden, layer, model.groups[group])
            logits.append(exit_logits)
        return jnp.stack(logits)

    if config.num_hidden_groups == config.num_hidden_layers:
        xs = (layers, model.groups)
        return jax.lax.scan(lambda hidden, x: step(hidden, *x), hidden, xs)[1]

    def shared_step(hidden, x):
        layer, group = x
        return step(hidden, layer, jax.tree.map(lambda leaf: leaf[group], model.groups))

    return jax.lax.scan(shared_step, hidden, (layers, jnp.array(config.layer_groups)))[1]
