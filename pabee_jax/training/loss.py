"""The losses of the exits, and what is made of them (PABEE, section 3.3)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

Logits = Float[Array, "exits batch classes"]


def exit_losses(
    logits: Logits, labels: Array, valid: Bool[Array, " batch"], count: Array | None = None
) -> Float[Array, " exits"]:
    """Each exit's loss over the valid rows: cross-entropy, or squared error for one class.

    With `count`, the valid rows of the whole batch of which these are a part, the parts' losses add
    up to the mean.
    """
    count = valid.sum() if count is None else count
    if logits.shape[2] == 1:
        rows = jnp.square(logits[:, :, 0] - labels)
    else:
        labels = jnp.broadcast_to(labels, logits.shape[:2])
        rows = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.where(valid, rows, 0).sum(axis=1) / count


def distillation_losses(
    logits: Logits, valid: Bool[Array, " batch"], temperature: float, count: Array | None = None
) -> Float[Array, " exits"]:
    """How far each exit is from the last one, whose predictions are taken as given.

    T^2 KL(softmax(z_L / T) || softmax(z_i / T)), so that the gradient's size does not depend on T
    ("Distilling the Knowledge in a Neural Network", section 2.1); the squared difference for one
    class. The last exit's is 0. `count` is as in `exit_losses`.
    """
    count = valid.sum() if count is None else count
    teacher = jax.lax.stop_gradient(logits[-1])
    if logits.shape[2] == 1:
        rows = jnp.square(logits - teacher)[:, :, 0]
    else:
        ours = jax.nn.log_softmax(logits / temperature)
        theirs = jax.nn.log_softmax(teacher / temperature)
        rows = temperature**2 * optax.losses.kl_divergence_with_log_targets(ours, theirs)
    means = jnp.where(valid, rows, 0).sum(axis=1) / count
    return means.at[-1].set(0.0)


def joint_loss(weights: Sequence[float], losses: Float[Array, " exits"]) -> jax.Array:
    """sum_i(i * loss_i) / sum_i(i) with linear weights.

    An exit of weight 0 is left out, so that a loss that nobody asked for cannot spoil the sum.
    """
    each = jnp.array(weights, jnp.float32)
    return jnp.where(each > 0, each * losses, 0).sum()
