"""The forward pass of training: every exit's logits, with dropout and scaled gradients."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from pabee_jax.drivers.full import over_layers
from pabee_jax.models.encoder import Batch, EarlyExitModel
from pabee_jax.models.layers import DROPOUT_MASK

_policies = jax.checkpoint_policies
_PRODUCTS_AND_MASKS = _policies.save_from_both_policies(
    _policies.dots_saveable, _policies.save_only_these_names(DROPOUT_MASK)
)


class GradientScales(NamedTuple):
    """Factors on gradients; the forward pass does not change. Each has shape (exits,).

    Attributes:
        exit: on the gradient that a layer's output receives from its own exit.
        path: on the gradient that a layer's output receives from the layers above.
    """

    exit: Float[Array, " exits"]
    path: Float[Array, " exits"]


@jax.custom_vjp
def scale_gradient(x: Array, scale: Array) -> Array:
    """Return `x`; its gradient is multiplied by `scale`."""
    del scale
    return x


scale_gradient.defvjp(
    lambda x, scale: (x, scale),
    lambda scale, gradient: ((scale * gradient).astype(gradient.dtype), jnp.zeros_like(scale)),
)


def training_logits(
    model: EarlyExitModel,
    batch: Batch,
    key: Key[Array, ""],
    gradient_scales: GradientScales | None = None,
    *,
    rematerialize: bool | None = None,
) -> Float[Array, "exits batch classes"]:
    """Return the logits of every exit, with dropout.

    Args:
        key: the dropout of layer i is a function of `key` and i only.
        gradient_scales: if absent, no gradient is scaled.
        rematerialize: which values the backward pass recomputes (`TrainConfig.rematerialize`).
            False stores each layer's matrix products and dropout masks and recomputes the rest.
            True stores only each layer's input. None leaves the choice to the compiler, which
            stores all values.
    """

    def step(hidden, layer, parameters):
        layer_key, exit_key = jax.random.split(jax.random.fold_in(key, layer + 1))
        hidden = exit_input = model.layer(parameters, hidden, mask, side.of_layer(layer), layer_key)
        if gradient_scales is not None:
            exit_input = scale_gradient(hidden, gradient_scales.exit[layer])
            hidden = scale_gradient(hidden, gradient_scales.path[layer])
        return hidden, model.exit_logits(layer, exit_input, mask, exit_key)

    if rematerialize is not None:
        policy = None if rematerialize else _PRODUCTS_AND_MASKS
        # Inside a scan, the compiler cannot merge the original computation and the recomputation.
        step = jax.checkpoint(step, policy=policy, prevent_cse=not model.is_stacked)
    hidden, mask, side = model.embed(batch, jax.random.fold_in(key, 0))
    return over_layers(model, step, hidden)
