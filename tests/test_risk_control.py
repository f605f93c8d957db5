"""Tests of risk control: the bound holds at the stated confidence, and the settings save layers."""

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
from pabee_jax.criteria import Entropy, FixedLayer, MaxProbability, Patience, PatientConfidence
from pabee_jax.drivers.replay import replay_many
from pabee_jax.errors import InputError

LAYERS, ROWS, RESAMPLES = 12, 20_000, 1000
MAX_DROP, CONFIDENCE = 0.02, 0.95


@pytest.fixture(scope="module")
def population():
    """Logits and labels of rows whose evidence for the correct class grows with the layer."""
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
    """Return settings from slow to fast that do not depend on the calibration rows."""
    return [MaxProbability(float(threshold)) for threshold in np.linspace(1.0, 0.5, 51)]


def test_the_bound_holds_at_the_stated_confidence_and_a_naive_choice_violates_it(population):
    logits, labels = population
    exit_layers, exit_logits = replay_many(settings(), logits)
    harmed = harms(exit_logits, logits[-1], labels)
    true_risk, saved = harmed.mean(axis=1), 1 - exit_layers.mean(axis=1) / LAYERS
    random = np.random.default_rng(1)
    violations = {"tested": 0, "naive": 0}
    layers_saved = []
    for _ in range(RESAMPLES):
        rows = random.integers(0, ROWS, 600)
        harmed_rows = harmed[:, rows].sum(axis=1)
        accepted = fixed_sequence(p_values(harmed_rows, 600, MAX_DROP), 1 - CONFIDENCE)
        if accepted:
            violations["tested"] += true_risk[accepted - 1] > MAX_DROP
        layers_saved.append(saved[accepted - 1] if accepted else 0.0)
        naive = np.flatnonzero(harmed_rows / 600 <= MAX_DROP)[-1]
        violations["naive"] += true_risk[naive] > MAX_DROP
    # Three standard deviations of the sampling error of a rate of 5% over 1000 resamples.
    error = 3 * math.sqrt(0.05 * 0.95 / RESAMPLES)
    assert violations["tested"] / RESAMPLES <= 0.05 + error, (
        f"the chosen settings violate the bound too often: {violations} of {RESAMPLES} resamples"
    )
    assert violations["naive"] / RESAMPLES > 0.25, (
        "the naive choice rarely violates the bound: make the rows of `population` harder"
    )
    most_saved = saved[true_risk <= MAX_DROP].max()
    assert np.mean(layers_saved) >= most_saved / 2, (
        "the chosen settings save less than half of the layers that the bound allows"
    )


def test_the_last_setting_before_the_first_failed_test_is_chosen(population):
    logits, labels = population
    calibration_logits, calibration_labels = logits[:, :600], labels[:600]
    guarantee = fastest_safe_setting(
        {"probability": settings()},
        calibration_logits,
        calibration_labels,
        max_drop=MAX_DROP,
        confidence=CONFIDENCE,
    )
    # The expected setting comes from SciPy's binomial test, setting by setting.
    last_accepted = None
    for setting in settings():
        exit_layers, exit_logits = replay_many([setting], calibration_logits)
        early = exit_logits[0].argmax(axis=1)
        full = calibration_logits[-1].argmax(axis=1)
        harmed = int(((full == calibration_labels) & (early != calibration_labels)).sum())
        if stats.binomtest(harmed, 600, MAX_DROP, alternative="less").pvalue > 0.05:
            break
        last_accepted = setting, harmed, float(exit_layers.mean())
    assert (guarantee.setting, guarantee.harmed, guarantee.mean_exit_layer) == last_accepted
    assert guarantee.mean_exit_layer < LAYERS - 1


def test_two_criteria_share_the_error_probability(population):
    logits, labels = population
    calibration_rows = logits[:, :600], labels[:600]
    common = dict(max_drop=MAX_DROP, confidence=CONFIDENCE)
    families = {
        "probability": settings(),
        "layer": [FixedLayer(layer) for layer in range(12, 0, -1)],
    }
    both = fastest_safe_setting(families, *calibration_rows, **common)
    stricter = fastest_safe_setting(
        {"probability": settings()}, *calibration_rows, max_drop=MAX_DROP, confidence=0.975
    )
    assert both.setting == stricter.setting


def test_without_labels_a_difference_from_full_depth_is_harm():
    exit_logits = np.array([[[0, 1], [1, 0], [1, 0]]], np.float32)
    full = np.array([[0, 1], [0, 1], [1, 0]], np.float32)
    assert harms(exit_logits, full).tolist() == [[False, True, False]]
    labels = np.array([1, 0, 1])  # Row 1 is wrong at full depth, so early exit does no harm.
    assert harms(exit_logits, full, labels).tolist() == [[False, False, False]]


def test_scores_are_correct_within_a_tolerance():
    exit_scores = np.array([[[1.0], [2.0], [3.5]]], np.float32)
    full = np.array([[1.25], [3.0], [3.0]], np.float32)
    labels = np.array([1.5, 3.0, 3.0], np.float32)
    assert harms(exit_scores, full, labels, 0.5).tolist() == [[False, True, False]]
    assert harms(exit_scores, full, labels, 0.25).tolist() == [[True, True, True]]
    with pytest.raises(InputError, match="scores need a tolerance"):
        harms(exit_scores, full, labels)


@pytest.mark.parametrize("max_drop", [0.01, 0.02, 0.05, 0.3])
@pytest.mark.parametrize("level", [0.05, 0.01])
def test_rows_needed_is_the_smallest_number_that_proves_the_bound(max_drop, level):
    """A fraction of harmed rows rounds up, so that the p-value rises and falls with the rows."""
    rows = np.arange(1, 60_001)
    for share in (0.0, 0.1, 0.23, 0.4, 1 / 3, 0.5, 0.77):
        risk = share * max_drop
        proven = stats.binom.cdf(np.ceil(risk * rows), rows, max_drop) <= level
        assert rows_needed(risk, max_drop, level) == rows[proven][0]


def test_rows_needed_has_limits():
    assert rows_needed(0.0, 0.01, 0.05) == 299
    assert rows_needed(0.01, 0.01, 0.05) is None
    assert rows_needed(0.0, 1e-7, 0.05) is None


def test_the_error_for_too_few_rows_names_the_rows_needed():
    logits = np.tile(np.float32([[3.0, 0.0]]), (4, 100, 1))
    with pytest.raises(
        NoSetting, match="100 calibration rows are too few.* at least 299 rows"
    ) as raised:
        fastest_safe_setting({"a": [Entropy(0.5)]}, logits, None, max_drop=0.01, confidence=0.95)
    assert not raised.value.is_tested
    with pytest.raises(NoSetting, match="for 2 criteria needs at least 368 rows"):
        fastest_safe_setting(
            {"a": [Entropy(0.5)], "b": [Patience(1)]}, logits, None, max_drop=0.01, confidence=0.95
        )


def test_the_error_for_no_qualifying_setting_names_the_remedy():
    logits = np.tile(np.float32([[3.0, 0.0]]), (4, 1000, 1))
    logits[-1, :9] *= -1  # Full depth predicts another class on 0.9% of the rows.
    with pytest.raises(
        NoSetting, match=r"harms 0.90% of 1000 .*about \d+ calibration rows would"
    ) as raised:
        fastest_safe_setting({"a": [Entropy(0.5)]}, logits, None, max_drop=0.01, confidence=0.95)
    assert raised.value.is_tested
    logits[-1, :50] = [0.0, 3.0]
    with pytest.raises(NoSetting, match="use a larger max_drop, because no number of"):
        fastest_safe_setting({"a": [Entropy(0.5)]}, logits, None, max_drop=0.01, confidence=0.95)


@pytest.mark.parametrize("invalid", [{"max_drop": 0.0}, {"max_drop": 1.0}, {"confidence": 1.0}])
def test_max_drop_and_confidence_must_be_between_0_and_1(invalid):
    values = {"max_drop": 0.01, "confidence": 0.95} | invalid
    with pytest.raises(InputError, match="must be between 0 and 1"):
        fastest_safe_setting({"a": [Entropy(0.5)]}, np.zeros((2, 3, 2), np.float32), None, **values)


def test_criteria_without_settings_for_the_model_are_an_error():
    families = PatientConfidence.families(np.zeros((2, 9, 2), np.float32), 10)
    with pytest.raises(NoSetting, match="no settings for a model with 2 exits"):
        fastest_safe_setting(
            families, np.zeros((2, 9, 2), np.float32), None, max_drop=0.5, confidence=0.5
        )
