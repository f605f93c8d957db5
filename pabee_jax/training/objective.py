"""The objective of a training step: the joint loss of the exits, and the losses added to it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from pabee_jax.models.encoder import Batch
from pabee_jax.training.config import TrainConfig
from pabee_jax.training.loss import Logits, joint_loss, mean_over_rows, row_distances, row_losses
from pabee_jax.training.sample_weights import calibration_loss, sample_weights, signals_of
from pabee_jax.training.strategy import Phase

# Folded into the key of a step; the dropout of the layers folds in their numbers, from 0.
_THRESHOLDS = 2**31 - 1


class Moment(NamedTuple):
    """What the objective of a step depends on beside the parameters and the rows.

    Attributes:
        key: the key of the step, or of the microbatch.
        num_rows: the number of valid rows of the step.
        progress: the share of the run's steps that are done, from 0 to below 1.
    """

    key: Key[Array, ""]
    num_rows: Int[Array, ""]
    progress: Float[Array, ""]


def objective(
    logits: Logits, batch: Batch, moment: Moment, phase: Phase, config: TrainConfig
) -> tuple[Float[Array, ""], Float[Array, " exits"]]:
    """Return the loss that a step minimizes, and the mean loss of each exit on the labels.

    If `batch` holds one microbatch, both are its share: the sums over the microbatches are those of
    the step.
    """
    valid, count = batch["valid"], moment.num_rows
    losses = to_minimize = row_losses(logits, batch["labels"])
    if config.distill.weight:
        distances = row_distances(logits, config.distill.temperature)
        to_minimize = losses + config.distill.weight * distances
    weights = jnp.array(phase.weights, jnp.float32)[:, None]
    total = jnp.float32(0)
    by_row = config.sample_weights
    if phase.trains_early_exits and (by_row.decay or by_row.calibration):
        signals = signals_of(logits, by_row.signal)
        if by_row.decay:
            key = jax.random.fold_in(moment.key, _THRESHOLDS)
            row_weights = sample_weights(signals, valid, moment.progress, key, by_row)
            # A phase that does not train the last exit gives it no weight.
            weights = jnp.where(weights > 0, row_weights, 0)
        if by_row.calibration:
            is_correct = logits.argmax(axis=2) == batch["labels"]
            calibration = calibration_loss(signals, is_correct, valid, by_row.margin)
            total = by_row.calibration * calibration * valid.sum() / count
    total = total + joint_loss(weights, to_minimize, valid, count)
    return total, mean_over_rows(losses, valid, count)
