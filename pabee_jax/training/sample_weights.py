"""Loss weights per row, from simulated early exit: COSEE (arXiv 2412.13236), sections 3.2, 3.3."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from pabee_jax.criteria.confidence import energy, highest_probability, normalized_entropy
from pabee_jax.training.config import SampleWeightsConfig
from pabee_jax.training.loss import Logits, Rows

# How difficult a row is for an exit, from its logits (rows, classes): low values exit early.
SIGNALS = {
    "energy": lambda logits: jax.nn.sigmoid(energy(logits, 1.0)),
    "max_probability": lambda logits: 1 - highest_probability(logits),
    "entropy": normalized_entropy,
}
Signals = Float[Array, "exits batch"]


def signals_of(logits: Logits, signal: str) -> Signals:
    """Return the difficulty of every row at every exit, from 0 to 1."""
    return jax.vmap(SIGNALS[signal])(logits)


def simulated_exits(
    signals: Signals, thresholds: Float[Array, " thresholds"]
) -> Int[Array, "thresholds batch"]:
    """Return the index of the first exit whose signal is below the threshold, or of the last."""
    exits = (signals < thresholds[:, None, None]).at[:, -1].set(True)
    return jnp.argmax(exits, axis=1)


def sample_weights(
    signals: Signals,
    valid: Rows,
    progress: Float[Array, ""],
    key: Key[Array, ""],
    config: SampleWeightsConfig,
) -> Float[Array, "exits batch"]:
    """Return the weight of every row at every exit; the weights of a row sum to 1.

    For one threshold, the weight is proportional to exp(-b |m - m*|) for exit m and the exit m* of
    the row (equation 3), where b is `config.decay` times `progress` (equation 4). The weights are
    the means over the thresholds (equation 5), which are uniform between the lowest and the highest
    signal of the batch. (The paper takes the range of the previous epoch, which a resumed run does
    not have.)

    Args:
        signals: the difficulty of every row at every exit; no gradient passes through it.
        valid: False for padding rows.
        progress: the share of the run's steps that are done, from 0 to 1.
        key: the key of the thresholds.
        config: the settings.
    """
    signals = jax.lax.stop_gradient(signals)
    lowest = jnp.where(valid, signals, jnp.inf).min()
    highest = jnp.where(valid, signals, -jnp.inf).max()
    uniform = jax.random.uniform(key, (config.thresholds,))
    exits = simulated_exits(signals, lowest + uniform * (highest - lowest))
    distances = jnp.abs(jnp.arange(len(signals))[:, None] - exits[:, None])
    return jax.nn.softmax(-config.decay * progress * distances, axis=1).mean(axis=0)


def calibration_loss(
    signals: Signals, is_correct: Bool[Array, "exits batch"], valid: Rows, margin: float
) -> Float[Array, ""]:
    """Return the mean over the early exits of max(0, easy - hard + margin) (equations 6 and 7).

    "easy" is the mean signal of the valid rows that the exit classifies correctly, and "hard" that
    of the other valid rows. An exit that has only rows of one kind in the batch has a loss of 0.
    """
    easy, hard = is_correct & valid, ~is_correct & valid
    difference = _mean(signals, easy) - _mean(signals, hard)
    has_both = easy.any(axis=1) & hard.any(axis=1)
    losses = jnp.where(has_both, jnp.maximum(0, difference + margin), 0)
    return losses[:-1].mean()


def _mean(values: Signals, mask: Bool[Array, "exits batch"]) -> Float[Array, " exits"]:
    return jnp.where(mask, values, 0).sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)
