"""The guarantee holds at the stated rate, a naive choice breaks it, and it still saves layers."""

import math

import numpy as np
import pytest
from scipy import stats

from pabee_jax.analysis.risk_control import (
    NoSetting,
    fastest_safe_setting,
    fixed_sequence,
    harms,
    p_values,
    rows_needed,
)
from pabee_jax.criteria import Entropy, FixedLayer, MaxProbability, Patience
from pabee_jax.drivers.replay import replay_many
from pabee_jax.errors import InputError

LAYERS, ROWS, RESAMPLES = 12, 20_000, 1000
MAX_DROP, CONFIDENCE = 0.02, 0.95


@pytest.fixture(scope="module")
def population():
    """Rows of varying difficulty: the evidence for the right class grows with the layer."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, ROWS)
    ease = random.gamma(2.0, 1.0, ROWS)
    layers = np.arange(1, LAYERS + 1)[:, None] / LAYERS
    noise = (
        np.cumsum(random.normal(size=(LAYERS, ROWS)), axis=0) / np.arange(1, LAYERS + 1)[:, None]
    )
    evidence = 4 * layers * ease + 1.5 * noise
    sign = 2 * labels - 1
    logits = np.stack([-sign * evidence, sign * evidence], axis=2) / 2
    return logits.astype(np.float32), labels


def settings():
    """Fixed beforehand, from slow to fast."""
    return [MaxProbability(float(t)) for t in np.linspace(1.0, 0.5, 51)]


def test_the_guarantee_holds_and_a_naive_choice_breaks_it(population):
    logits, labels = population
    exit_layers, answers = replay_many(settings(), logits)
    harmed = harms(answers, logits[-1], labels)
    true_risk, saved = harmed.mean(axis=1), 1 - exit_layers.mean(axis=1) / LAYERS
    random = np.random.default_rng(1)
    broken = {"tested": 0, "naive": 0}
    layers_saved = []
    for _ in range(RESAMPLES):
        rows = random.integers(0, ROWS, 600)
        count = harmed[:, rows].sum(axis=1)
        accepted = fixed_sequence(p_values(count, 600, MAX_DROP), 1 - CONFIDENCE)
        if accepted:
            broken["tested"] += true_risk[accepted - 1] > MAX_DROP
        layers_saved.append(saved[accepted - 1] if accepted else 0.0)
        naive = np.flatnonzero(count / 600 <= MAX_DROP)[-1]
        broken["naive"] += true_risk[naive] > MAX_DROP
    # The sampling error of a rate of 5% over so many resamples, three standard deviations.
    error = 3 * math.sqrt(0.05 * 0.95 / RESAMPLES)
    assert broken["tested"] / RESAMPLES <= 0.05 + error, broken
    assert broken["naive"] / RESAMPLES > 0.25, "this population makes it too easy"
    best = saved[true_risk <= MAX_DROP].max()
    assert np.mean(layers_saved) >= best / 2, "the guarantee is bought by staying slow"


def test_chooses_the_last_setting_before_the_first_failure(population):
    logits, labels = population
    sample, ours = logits[:, :600], labels[:600]
    chosen = fastest_safe_setting(
        {"one": settings()}, sample, ours, max_drop=MAX_DROP, confidence=CONFIDENCE
    )
    # Once more, setting by setting, with scipy's binomial test.
    last = None
    for setting in settings():
        exits, answers = replay_many([setting], sample)
        early, full = answers[0].argmax(axis=1), sample[-1].argmax(axis=1)
        count = int(((full == ours) & (early != ours)).sum())
        if stats.binomtest(count, 600, MAX_DROP, alternative="less").pvalue > 0.05:
            break
        last = setting, count, float(exits.mean())
    assert (chosen.setting, chosen.harmed, chosen.mean_exit_layer) == last
    assert chosen.mean_exit_layer < LAYERS - 1


def test_two_criteria_share_the_error(population):
    logits, labels = population
    sample, ours = logits[:, :600], labels[:600]
    common = dict(max_drop=MAX_DROP, confidence=CONFIDENCE)
    families = {
        "probability": settings(),
        "layer": [FixedLayer(layer) for layer in range(12, 0, -1)],
    }
    both = fastest_safe_setting(families, sample, ours, **common)
    stricter = fastest_safe_setting(
        {"probability": settings()}, sample, ours, max_drop=MAX_DROP, confidence=0.975
    )
    assert both.setting == stricter.setting


def test_without_labels_disagreement_is_the_risk():
    answers = np.array([[[0, 1], [1, 0], [1, 0]]], np.float32)
    full = np.array([[0, 1], [0, 1], [1, 0]], np.float32)
    assert harms(answers, full).tolist() == [[False, True, False]]
    labels = np.array([1, 0, 1])  # Where full depth is wrong, leaving early does no harm.
    assert harms(answers, full, labels).tolist() == [[False, False, False]]


def test_scores_are_right_within_a_tolerance():
    answers = np.array([[[1.0], [2.0], [3.5]]], np.float32)
    full = np.array([[1.25], [3.0], [3.0]], np.float32)
    labels = np.array([1.5, 3.0, 3.0], np.float32)
    assert harms(answers, full, labels, 0.5).tolist() == [[False, True, False]]
    assert harms(answers, full, labels, 0.25).tolist() == [[True, True, True]]
    with pytest.raises(InputError, match="scores need a tolerance"):
        harms(answers, full, labels)


def test_rows_needed_is_the_smallest_number():
    for risk, level in ((0.0, 0.05), (0.004, 0.05), (0.005, 0.01)):
        needed = rows_needed(risk, 0.01, level)
        shown = [
            stats.binom.cdf(math.ceil(risk * n), n, 0.01) <= level for n in (needed, needed - 1)
        ]
        assert shown == [True, False]
    assert rows_needed(0.0, 0.01, 0.05) == 299
    assert rows_needed(0.01, 0.01, 0.05) is None


def test_says_how_many_rows_are_needed():
    logits = np.tile(np.float32([[3.0, 0.0]]), (4, 100, 1))
    with pytest.raises(NoSetting, match="100 calibration rows are too few.* takes 299 rows"):
        fastest_safe_setting({"a": [Entropy(0.5)]}, logits, None, max_drop=0.01, confidence=0.95)
    with pytest.raises(NoSetting, match="for 2 criteria takes 368 rows"):
        fastest_safe_setting(
            {"a": [Entropy(0.5)], "b": [Patience(1)]}, logits, None, max_drop=0.01, confidence=0.95
        )


def test_says_when_no_setting_qualifies():
    logits = np.tile(np.float32([[3.0, 0.0]]), (4, 1000, 1))
    logits[-1, :9] *= -1  # Full depth says otherwise on 0.9% of the rows.
    with pytest.raises(NoSetting, match=r"did harm to 0.90% of 1000 rows.*about \d+ rows would"):
        fastest_safe_setting({"a": [Entropy(0.5)]}, logits, None, max_drop=0.01, confidence=0.95)
    logits[-1, :50] = [0.0, 3.0]
    with pytest.raises(NoSetting, match="no number of rows can show it: allow a larger max_drop"):
        fastest_safe_setting({"a": [Entropy(0.5)]}, logits, None, max_drop=0.01, confidence=0.95)


@pytest.mark.parametrize("wrong", [{"max_drop": 0.0}, {"max_drop": 1.0}, {"confidence": 1.0}])
def test_refuses_what_is_no_probability(wrong):
    values = {"max_drop": 0.01, "confidence": 0.95} | wrong
    with pytest.raises(InputError, match="must be between 0 and 1"):
        fastest_safe_setting({"a": [Entropy(0.5)]}, np.zeros((2, 3, 2), np.float32), None, **values)
