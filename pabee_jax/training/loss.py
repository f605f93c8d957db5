"""The losses of the exits on the rows of a batch, and their weighted sum (PABEE, section 3.3)."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

Logits = Float[Array, "exits batch classes"]
RowLosses = Float[Array, "exits batch"]
Rows = Bool[Array, " batch"]


def row_losses(logits: Logits, labels: Array) -> RowLosses:
    """Return the loss of each exit on each row.

    The loss is the cross-entropy, or the squared error if there is one class (regression).

    Args:
        logits: the logits of every exit.
        labels: (batch,) class indices, or scores for regression.
    """
    if logits.shape[2] == 1:
        return jnp.square(logits[:, :, 0] - labels)
    labels = jnp.broadcast_to(labels, logits.shape[:2])
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def row_distances(logits: Logits, temperature: float) -> RowLosses:
    """Return the distance of each exit's prediction for each row from the last exit's prediction.

    The distance is T^2 KL(softmax(z_L / T) || softmax(z_i / T)). The factor T^2 makes the size of
    the gradient independent of T ("Distilling the Knowledge in a Neural Network", section 2.1).
    With one class (regression), the distance is the squared difference. The last exit receives no
    gradient, and its own distance is 0.

    Args:
        logits: the logits of every exit.
        temperature: T; it has no effect with one class.
    """
    teacher = jax.lax.stop_gradient(logits[-1])
    if logits.shape[2] == 1:
        distances = jnp.square(logits - teacher)[:, :, 0]
    else:
        log_predictions = jax.nn.log_softmax(logits / temperature)
        log_targets = jax.nn.log_softmax(teacher / temperature)
        distances = temperature**2 * optax.losses.kl_divergence_with_log_targets(
            log_predictions, log_targets
        )
    return distances.at[-1].set(0.0)


def mean_over_rows(losses: RowLosses, valid: Rows, count: Array) -> Float[Array, " exits"]:
    """Return the mean loss of each exit over the valid rows.

    Args:
        losses: the losses of the rows.
        valid: False for padding rows.
        count: the number of valid rows. When `losses` holds one microbatch, it is the number of
            valid rows of the whole batch: the means of the microbatches then add up to the mean
            over the batch.
    """
    return jnp.where(valid, losses, 0).sum(axis=1) / count


def joint_loss(
    weights: Float[Array, "exits rows"], losses: RowLosses, valid: Rows, count: Array
) -> Float[Array, ""]:
    """Return the mean over the valid rows of the weighted sum of the exits' losses.

    With linear weights, the sum is sum_i(i * loss_i) / sum_i(i). A loss of weight 0 is left out,
    so that a NaN or infinite loss cannot enter the sum.

    Args:
        weights: the weight of each exit for all rows (one column), or for every row.
        losses: the losses of the rows.
        valid, count: as in `mean_over_rows`.
    """
    return mean_over_rows(jnp.where(weights > 0, weights * losses, 0), valid, count).sum()
