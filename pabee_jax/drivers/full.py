"""Driver `full`: every layer runs and every exit answers. The oracle of all other drivers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from pabee_jax.layers import DROPOUT_MASK
from pabee_jax.model import Batch, EarlyExitModel

_policies = jax.checkpoint_policies
_PRODUCTS_AND_MASKS = _policies.save_from_both_policies(
    _policies.dots_saveable, _policies.save_only_these_names(DROPOUT_MASK)
)


class GradientScales(NamedTuple):
    """Factors on gradients in training; the forward pass does not change. Each is (exits,).

    Attributes:
        exit: on what enters a layer's output from its own exit.
        path: on what enters it from the layers above.
    """

    exit: Float[Array, " exits"]
    path: Float[Array, " exits"]


@jax.custom_vjp
def scale_gradient(x: Array, scale: Array) -> Array:
    """`x`, whose gradient is multiplied by `scale`."""
    del scale
    return x


scale_gradient.defvjp(
    lambda x, scale: (x, scale),
    lambda scale, gradient: ((scale * gradient).astype(gradient.dtype), jnp.zeros_like(scale)),
)


def all_exit_logits(
    model: EarlyExitModel,
    batch: Batch,
    key: Key[Array, ""] | None = None,
    gradient_scales: GradientScales | None = None,
    *,
    rematerialize: bool | None = None,
) -> Float[Array, "exits batch classes"]:
    """Logits of every exit; with a key, dropout is active (training).

    The dropout of layer i depends on `key` and i only. `rematerialize` is for a backward pass:
    False keeps each layer's matrix products and dropout masks, and computes the rest once more;
    True keeps only its input (`TrainConfig.rematerialize`); None leaves the choice to the compiler,
    which keeps all.
    """
    config = model.config
    layers = jnp.arange(config.num_hidden_layers)

    def layer_keys(layer):
        if key is None:
            return None, None
        return jax.random.split(jax.random.fold_in(key, layer + 1))

    def step(hidden, layer, parameters):
        layer_key, exit_key = layer_keys(layer)
        hidden = read = model.layer(parameters, hidden, mask, layer_key)
        if gradient_scales is not None:
            read = scale_gradient(hidden, gradient_scales.exit[layer])
            hidden = scale_gradient(hidden, gradient_scales.path[layer])
        return hidden, model.exit_logits(layer, read, mask, exit_key)

    if rematerialize is not None:
        kept = None if rematerialize else _PRODUCTS_AND_MASKS
        # Inside a scan the compiler cannot merge the two computations.
        step = jax.checkpoint(step, policy=kept, prevent_cse=not model.is_stacked)
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
