"""The losses of the exits, and their weighted sum (PABEE, section 3.3)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

Logits = Float[Array, "exits batch classes"]


def exit_losses(
    logits: Logits, labels: Array, valid: Bool[Array, " batch"], count: Array | None = None
) -> Float[Array, " exits"]:
    """Return the mean loss of each exit over the valid rows.

    The loss is the cross-entropy, or the squared error if there is one class (regression).

    Args:
        logits: the logits of every exit.
        labels: (batch,) class indices, or scores for regression.
        valid: False for padding rows.
        count: the divisor of the sum; absent, the number of valid rows in `logits`. When `logits`
            holds one microbatch, pass the number of valid rows of the whole batch: the losses of
            the microbatches then add up to the mean over the batch.
    """
    count = valid.sum() if count is None else count
    if logits.shape[2] == 1:
        row_losses = jnp.square(logits[:, :, 0] - labels)
    else:
        labels = jnp.broadcast_to(labels, logits.shape[:2])
        row_losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.where(valid, row_losses, 0).sum(axis=1) / count


def distillation_losses(
    logits: Logits, valid: Bool[Array, " batch"], temperature: float, count: Array | None = None
) -> Float[Array, " exits"]:
    """Return the mean distance of each exit's predictions from the last exit's predictions.

    The distance is T^2 KL(softmax(z_L / T) || softmax(z_i / T)). The factor T^2 makes the size of
    the gradient independent of T ("Distilling the Knowledge in a Neural Network", section 2.1).
    With one class (regression), the distance is the squared difference. The last exit receives no
    gradient, and its own loss is 0.

    Args:
        logits: the logits of every exit.
        valid: False for padding rows.
        temperature: T; it has no effect with one class.
        count: as in `exit_losses`.
    """
    count = valid.sum() if count is None else count
    teacher = jax.lax.stop_gradient(logits[-1])
    if logits.shape[2] == 1:
        row_losses = jnp.square(logits - teacher)[:, :, 0]
    else:
        log_predictions = jax.nn.log_softmax(logits / temperature)
        log_targets = jax.nn.log_softmax(teacher / temperature)
        row_losses = temperature**2 * optax.losses.kl_divergence_with_log_targets(
            log_predictions, log_targets
        )
    means = jnp.where(valid, row_losses, 0).sum(axis=1) / count
    return means.at[-1].set(0.0)


def joint_loss(weights: Sequence[float], losses: Float[Array, " exits"]) -> jax.Array:
    """Return the weighted sum of the exits' losses.

    With linear weights, the sum is sum_i(i * loss_i) / sum_i(i). An exit of weight 0 is left out,
    so that a NaN or infinite loss of that exit cannot enter the sum.
    """
    weight_array = jnp.array(weights, jnp.float32)
    return jnp.where(weight_array > 0, weight_array * losses, 0).sum()
