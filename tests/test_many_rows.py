"""More than 32,768 rows in one program, against NumPy.

For products of matrices with three columns, XLA's CPU backend of jaxlib 0.10.2 returns wrong values
beyond that row (https://github.com/jax-ml/jax/issues/39103). No program of pabee_jax does.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from helpers import tiny_model
from pabee_jax.criteria import Consistency, Divergence, Entropy, Patience
from pabee_jax.drivers import exit_rule
from pabee_jax.drivers.replay import replay_many
from pabee_jax.drivers.resident_pool import RowSettings
from pabee_jax.models.parameters import split
from pabee_jax.training.sample_weights import signals_of

ROWS, EXITS = 40_000, 4


def random_logits(classes):
    return np.random.default_rng(classes).normal(size=(EXITS, ROWS, classes)).astype(np.float32)


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def entropies(logits):
    log_p = log_softmax(logits)
    return -(np.exp(log_p) * log_p).sum(axis=-1) / np.log(logits.shape[-1])


def divergences(logits):
    p = np.exp(log_softmax(logits))
    middle = (p[1:] + p[:-1]) / 2
    parts = [(q * np.log(q / middle)).sum(axis=-1) for q in (p[1:], p[:-1])]
    return np.concatenate([np.ones((1, len(p[0]))), sum(parts) / 2])


def agreements(logits):
    predictions = logits.argmax(axis=-1)
    return np.concatenate([np.zeros((1, ROWS), bool), predictions[1:] == predictions[:-1]])


def first_of(consecutive, holds):
    """Return, from 1, the first exit at which so many consecutive exits hold, or the last."""
    exits = np.full(ROWS, EXITS)
    for exit in range(EXITS, consecutive - 1, -1):
        exits[holds[exit - consecutive : exit].all(axis=0)] = exit
    return exits


SETTINGS = {
    "patience": ([Patience(1), Patience(2)], lambda logits: agreements(logits), (1, 2)),
    "entropy": (
        [Entropy(0.6), Entropy(0.8)],
        lambda logits: entropies(logits)[None] < np.array([0.6, 0.8])[:, None, None],
        (1, 1),
    ),
    "divergence": (
        [Divergence(1, 0.1), Divergence(2, 0.1)],
        lambda logits: divergences(logits) < 0.1,
        (1, 2),
    ),
}


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", SETTINGS)
def test_criteria(name, classes):
    settings, holds_of, consecutive = SETTINGS[name]
    logits = random_logits(classes)
    holds = np.broadcast_to(holds_of(logits), (2, EXITS, ROWS))
    expected = [first_of(*pair) for pair in zip(consecutive, holds, strict=True)]

    exit_layers, exit_logits = replay_many(settings, logits)
    for found, answers, layers in zip(exit_layers, exit_logits, expected, strict=True):
        assert (found != layers).sum() <= 2, "at most a row or two are on the threshold"
        np.testing.assert_array_equal(answers, logits[found - 1, np.arange(ROWS)])

    # Every second row has the second setting.
    of_rows = [settings[row % 2] for row in range(ROWS)]
    criterion = RowSettings(jax.tree.map(lambda *leaves: np.stack(leaves), *of_rows))
    found, _ = jax.jit(all_exits)(criterion, logits)
    mixed = np.where(np.arange(ROWS) % 2, expected[1], expected[0])
    assert (found != mixed).sum() <= 2


def all_exits(criterion, logits):
    state = exit_rule.initial_state(
        criterion, jnp.zeros_like(logits[0]), jnp.arange(ROWS), jnp.zeros(ROWS, bool)
    )
    for layer in range(1, EXITS + 1):
        state = exit_rule.apply(criterion, state, logits[layer - 1], layer, EXITS)
    return state.exit_layer, state.logits


@pytest.mark.parametrize("hidden", [3, 16])
@pytest.mark.parametrize("pooler", ["shared", "per_exit"])
def test_classifiers_of_all_exits_with_a_criterion(hidden, pooler):
    """As in the pool, whose rows are at different layers: all exits under `vmap`."""
    model = tiny_model(
        "bert",
        3,
        num_hidden_layers=EXITS,
        hidden_size=hidden,
        num_attention_heads=1,
        intermediate_size=8,
        exit_pooler=pooler,
    )
    features = np.random.default_rng(0).normal(size=(ROWS, hidden)).astype(np.float32)

    def classified(model, features):
        logits = jax.vmap(model.classify, in_axes=(0, None))(jnp.arange(EXITS), features)
        return logits, *all_exits(Entropy(0.8), logits)

    logits, exit_layers, answers = jax.jit(classified)(model, features)
    arrays = {name: np.asarray(value, np.float64) for name, value in split(model)[1].items()}
    poolers = [
        np.broadcast_to(arrays[f"pooler.{name}"], (EXITS, *shape))
        for name, shape in (("kernel", (hidden, hidden)), ("bias", (hidden,)))
    ]
    pooled = np.tanh(features @ poolers[0] + poolers[1][:, None])
    expected = pooled @ arrays["classifiers.kernel"] + arrays["classifiers.bias"][:, None]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    layers = first_of(1, entropies(expected) < 0.8)
    assert (exit_layers != layers).sum() <= 2
    np.testing.assert_allclose(
        answers, expected[np.asarray(exit_layers) - 1, np.arange(ROWS)], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("classes", [2, 3])
def test_measures_for_sweeps_fitting_and_sample_weights(classes):
    logits = random_logits(classes)
    np.testing.assert_allclose(
        jax.jit(signals_of, static_argnums=1)(logits, "entropy"), entropies(logits), atol=1e-5
    )
    thresholds = [setting.threshold for setting in Entropy.families(logits, 11)[""]]
    np.testing.assert_allclose(
        thresholds, np.quantile(entropies(logits), np.linspace(0, 1, 11)), atol=1e-3
    )


def test_consistency_is_fitted_to_the_margins():
    """Without earlier exits, the inputs are the predicted class and the margin of exit 1."""
    logits = random_logits(3)[[0, -1]]
    classes, highest = logits.argmax(axis=2), np.sort(logits, axis=2)
    margin = (highest[..., -1] - highest[..., -2])[0]
    inputs = np.column_stack([np.eye(3)[classes[0]], margin, np.zeros(ROWS)])
    fitted = LogisticRegression().fit(inputs, classes[0] == classes[1])
    expected = fitted.coef_[0] + fitted.intercept_ * [1, 1, 1, 0, 0]
    np.testing.assert_allclose(Consistency.fit(logits).coefficients[0], expected, atol=1e-3)
