"""Loss weights per row against the equations of COSEE in plain Python."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pabee_jax.training.config import SampleWeightsConfig, TrainConfig
from pabee_jax.training.objective import Moment, objective
from pabee_jax.training.sample_weights import (
    calibration_loss,
    sample_weights,
    signals_of,
    simulated_exits,
)
from pabee_jax.training.strategy import phase_of

EXITS, ROWS = 4, 9


def random_logits(classes=3, seed=0):
    return np.random.default_rng(seed).normal(size=(EXITS, ROWS, classes)).astype(np.float32) * 2


def probabilities(values):
    exponentials = [math.exp(value) for value in values]
    return [value / sum(exponentials) for value in exponentials]


SIGNALS = {
    "energy": lambda z: 1 / (1 + sum(math.exp(value) for value in z)),
    "max_probability": lambda z: 1 - max(probabilities(z)),
    "entropy": lambda z: -sum(p * math.log(p) for p in probabilities(z)) / math.log(len(z)),
}


@pytest.mark.parametrize("signal", SIGNALS)
def test_signals_equal_their_formulas(signal):
    logits = random_logits()
    expected = [[SIGNALS[signal](row.tolist()) for row in of_exit] for of_exit in logits]
    np.testing.assert_allclose(signals_of(jnp.asarray(logits), signal), expected, rtol=1e-5)


def weights_of(exit_layer, decay):
    """Return equation 3 for a row that exits at index `exit_layer`."""
    weights = [math.exp(-decay * abs(exit - exit_layer)) for exit in range(EXITS)]
    return [weight / sum(weights) for weight in weights]


def test_a_row_exits_at_the_first_signal_below_the_threshold_or_at_the_last_exit():
    signals = jnp.array([[0.9, 0.2], [0.5, 0.9], [0.1, 0.1], [0.8, 0.7]])
    exits = simulated_exits(signals, jnp.array([0.6, 0.05, 0.15]))
    assert exits.tolist() == [[1, 0], [3, 3], [2, 2]]


def test_the_weights_are_the_mean_of_equation_3_over_the_thresholds():
    signals = np.asarray(signals_of(jnp.asarray(random_logits()), "energy"))
    valid = np.arange(ROWS) < 7
    config = SampleWeightsConfig(decay=2.0, thresholds=3)
    key, progress = jax.random.key(4), 0.25
    weights = sample_weights(*map(jnp.asarray, (signals, valid)), progress, key, config)
    low, high = signals[:, valid].min(), signals[:, valid].max()
    thresholds = low + np.asarray(jax.random.uniform(key, (3,))) * (high - low)
    for row in range(ROWS):
        of_row = []
        for threshold in thresholds:
            below = [exit for exit in range(EXITS - 1) if signals[exit, row] < threshold]
            of_row.append(weights_of(min(below, default=EXITS - 1), 2.0 * 0.25))
        np.testing.assert_allclose(weights[:, row], np.mean(of_row, axis=0), rtol=1e-5)


def test_the_weights_are_equal_at_the_start_and_have_no_gradient():
    config = SampleWeightsConfig(decay=5.0)
    logits, valid = jnp.asarray(random_logits()), jnp.ones(ROWS, bool)

    def weights(logits, progress):
        signals = signals_of(logits, "energy")
        return sample_weights(signals, valid, progress, jax.random.key(0), config)

    np.testing.assert_allclose(weights(logits, 0.0), 1 / EXITS, rtol=1e-6)
    assert not jax.grad(lambda logits: weights(logits, 0.5)[0].sum())(logits).any()


def test_calibration_separates_the_rows_that_an_exit_classifies_correctly():
    signals = np.random.default_rng(1).uniform(size=(EXITS, ROWS)).astype(np.float32)
    is_correct = np.arange(EXITS * ROWS).reshape(EXITS, ROWS) % 3 > 0
    is_correct[1] = True  # Without a row that is classified wrongly, there is nothing to separate.
    valid = np.arange(ROWS) != 4
    expected = []
    for exit in range(EXITS - 1):
        easy = [signals[exit, row] for row in range(ROWS) if valid[row] and is_correct[exit, row]]
        hard = [
            signals[exit, row] for row in range(ROWS) if valid[row] and not is_correct[exit, row]
        ]
        difference = np.mean(easy) - np.mean(hard) if hard else -math.inf
        expected.append(max(0, difference + 0.3))
    assert expected[1] == 0 < expected[0]
    loss = calibration_loss(*map(jnp.asarray, (signals, is_correct, valid)), 0.3)
    assert float(loss) == pytest.approx(np.mean(expected), rel=1e-5)


def batch_of(rows=ROWS):
    return {"labels": jnp.arange(rows) % 3, "valid": jnp.arange(rows) < rows - 1}


def objective_of(config, logits, step=5, total_steps=10):
    batch = batch_of()
    moment = Moment(jax.random.key(0), batch["valid"].sum(), jnp.float32(step / total_steps))
    phase = phase_of(config, step, total_steps, EXITS)
    return objective(jnp.asarray(logits), batch, moment, phase, config)


def test_the_objective_without_decay_is_the_uniform_loss_at_the_first_step():
    """At step 0 all exits have the same weight, whatever `loss.weights` is."""
    config = TrainConfig(sample_weights=SampleWeightsConfig(decay=3.0))
    total, losses = objective_of(config, random_logits(), step=0)
    np.testing.assert_allclose(total, losses.mean(), rtol=1e-6)


def test_the_objective_adds_the_calibration_loss():
    logits = random_logits()
    plain, _ = objective_of(TrainConfig(), logits)
    weights = SampleWeightsConfig(calibration=0.5, margin=0.4)
    total, _ = objective_of(TrainConfig(sample_weights=weights), logits)
    batch = batch_of()
    is_correct = jnp.asarray(logits).argmax(axis=2) == batch["labels"]
    signals = signals_of(jnp.asarray(logits), "energy")
    expected = 0.5 * calibration_loss(signals, is_correct, batch["valid"], 0.4)
    assert float(expected) > 0
    np.testing.assert_allclose(total - plain, expected, rtol=1e-4)


def test_a_phase_of_the_last_exit_alone_has_neither_sample_weights_nor_calibration():
    weights = SampleWeightsConfig(decay=3.0, calibration=1.0)
    config = TrainConfig(strategy="last_first", sample_weights=weights)
    total, losses = objective_of(config, random_logits(), step=2)
    assert float(total) == pytest.approx(float(losses[-1]), rel=1e-6)
    config = dataclasses.replace(config, strategy="two_stage")
    total, losses = objective_of(
        config,
        np.where(np.arange(EXITS)[:, None, None] == EXITS - 1, np.nan, random_logits()),
        step=7,
    )
    assert np.isfinite(total), "the frozen last exit enters the loss"
