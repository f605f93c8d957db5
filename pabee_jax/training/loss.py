"""The joint loss over all exits (PABEE, section 3.3)."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float


def exit_weights(kind: str, num_exits: int) -> Float[Array, " exits"]:
    """Weights that sum to 1: `linear` (exit i counts i times), `uniform`, or `last`."""
    exits = jnp.arange(1, num_exits + 1, dtype=jnp.float32)
    weights = {
        "linear": exits,
        "uniform": jnp.ones(num_exits),
        "last": jnp.float32(exits == num_exits),
    }[kind]
    return weights / weights.sum()


def exit_losses(
    logits: Float[Array, "exits batch classes"], labels: Array, valid: Bool[Array, " batch"]
) -> Float[Array, " exits"]:
    """Each exit's mean loss over the valid rows: cross-entropy, or squared error for one class."""
    if logits.shape[2] == 1:
        rows = jnp.square(logits[:, :, 0] - labels)
    else:
        labels = jnp.broadcast_to(labels, logits.shape[:2])
        rows = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.where(valid, rows, 0).sum(axis=1) / valid.sum()


def joint_loss(weights: Float[Array, " exits"], losses: Float[Array, " exits"]) -> jax.Array:
    """sum_i(i * loss_i) / sum_i(i) with linear weights.

    An exit of weight 0 is left out, so that a loss that nobody asked for cannot spoil the sum.
    """
    return jnp.where(weights > 0, weights * losses, 0).sum()
