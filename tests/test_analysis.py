"""Tests of the exit statistics and the trade-off curves against values computed by hand."""

import numpy as np
import pytest

from pabee_jax.analysis import exits
from pabee_jax.analysis.curves import Curve, curves
from pabee_jax.criteria import Entropy, FixedLayer, Patience
from pabee_jax.errors import InputError


def logits_of_classes(table):
    """Return (exits, rows, 2) logits whose predictions are the classes in the table."""
    table = np.asarray(table)
    return np.stack([1 - table, table], axis=2).astype(np.float32)


def test_the_calibration_error_is_the_weighted_mean_over_confidence_bins():
    # Two of four rows with confidence 0.75 are correct; one row with confidence 0.95 is correct:
    # 4/5 * |0.5 - 0.75| + 1/5 * |1 - 0.95| = 0.21.
    confidence = np.array([0.75, 0.75, 0.75, 0.75, 0.95])
    logits = np.stack([np.zeros(5), np.log(confidence / (1 - confidence))], axis=1)
    labels = np.array([1, 1, 0, 0, 1])
    error = exits.expected_calibration_error(logits.astype(np.float32), labels)
    assert error == pytest.approx(0.21, abs=1e-6)


def test_correct_predictions_with_confidence_1_have_no_calibration_error():
    logits = np.array([[1e4, -1e4], [-1e4, 1e4]], np.float32)
    assert exits.expected_calibration_error(logits, np.array([0, 1])) == 0


def test_overthinking_counts_rows_whose_correctness_changes_until_the_last_exit():
    # The rows are correct: at every exit; at exits 1 and 2; at exit 3; at no exit.
    right = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0]], bool)
    statistics = exits.overthinking(right)
    assert statistics.lost.tolist() == [0.25, 0.25, 0]
    assert statistics.won.tolist() == [0.25, 0.25, 0]
    assert statistics.ever_lost == 0.25
    assert statistics.layers_after == pytest.approx((2 + 2 + 0) / 3)


def test_without_correct_exits_overthinking_is_zero():
    statistics = exits.overthinking(np.zeros((3, 4), bool))
    assert (statistics.ever_lost, statistics.layers_after) == (0, 0)


def test_a_score_is_correct_within_the_tolerance():
    logits = np.array([[1.0, 2.0], [1.5, 3.0]], np.float32)[..., None]
    labels = np.array([1.5, 2.0], np.float32)
    assert exits.right_at(logits, labels, 0.5).tolist() == [[True, True], [True, False]]


def test_exits_agree_by_equal_classes_or_by_correlated_scores():
    logits = logits_of_classes([[0, 0, 1, 1], [0, 0, 1, 0], [1, 1, 0, 0]])
    assert exits.agreement_of_exits(logits).tolist() == [
        [1, 0.75, 0],
        [0.75, 1, 0.25],
        [0, 0.25, 1],
    ]
    scores = np.array([[0, 1, 2], [0, 2, 4], [2, 1, 0], [5, 5, 5]], np.float32)[..., None]
    correlations = exits.agreement_of_exits(scores)
    np.testing.assert_allclose(correlations[0, :3], [1, 1, -1], atol=1e-6)
    assert np.isnan(correlations[0, 3])


def test_exit_shares_and_difficulty_follow_from_the_exit_layers():
    exit_layers = [np.array([1, 1, 3]), np.array([2, 1, 3])]
    assert exits.exit_shares(exit_layers, 3).tolist() == pytest.approx(
        np.array([[2 / 3, 0, 1 / 3], [1 / 3, 1 / 3, 1 / 3]])
    )
    order, mean_exit_layers = exits.by_difficulty(exit_layers)
    assert order.tolist() == [1, 0, 2] and mean_exit_layers.tolist() == [1.5, 1, 3]


def accuracy_with(labels):
    return lambda logits: float((logits.argmax(axis=1) == labels).mean())


def test_a_curve_interpolates_linearly_between_its_settings():
    curve = Curve("x", [None, None], np.array([3.0, 2.0]), np.array([0.9, 0.7]), (0.5, 1.0), 4)
    assert curve.at(0.25) == pytest.approx(0.9)
    assert curve.at(0.375) == pytest.approx(0.8)  # Halfway between the two settings.
    assert curve.at(0.125) == pytest.approx(0.95)  # Between the slower setting and full depth.
    # The trapezoids from layer 1 to 2, 2 to 3 and 3 to 4: (0.6 + 0.8 + 0.95) / 3.
    assert curve.area == pytest.approx(2.35 / 3)


def test_every_fitting_criterion_has_a_curve_from_slow_to_fast():
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 200)
    logits = random.normal(size=(6, 200, 3)).astype(np.float32)
    logits += np.arange(6)[:, None, None] * np.eye(3, dtype=np.float32)[labels]
    accuracy = accuracy_with(labels)
    all_curves = curves(logits, accuracy, count=20)
    names = {curve.name.partition(",")[0] for curve in all_curves}
    assert names == {
        *("patience", "fixed_layer", "vote", "entropy", "max_probability", "margin"),
        *("patient_confidence", "divergence", "energy", "ensemble", "window"),
        "consistency",
    }
    for curve in all_curves:
        assert (np.diff(curve.mean_exit_layers) <= 1e-6).all(), curve.name
        assert curve.ends == (accuracy(logits[0]), accuracy(logits[-1]))
    fixed = next(curve for curve in all_curves if curve.name == "fixed_layer")
    for setting, layer, score in zip(
        fixed.settings, fixed.mean_exit_layers, fixed.scores, strict=True
    ):
        assert layer == setting.layer and score == accuracy(logits[setting.layer - 1])


def test_regression_has_curves_of_the_regression_criteria_only():
    random = np.random.default_rng(1)
    logits = random.normal(size=(4, 50, 1)).astype(np.float32)
    all_curves = curves(logits, lambda scores: float("nan"), count=5)
    assert {type(curve.settings[0]) for curve in all_curves} == {Patience, FixedLayer}
    assert all(
        np.isnan([*curve.scores, *curve.ends, curve.area, curve.at(0.5)]).all()
        for curve in all_curves
    )
    with pytest.raises(InputError, match="Entropy is for classification"):
        curves(logits, lambda scores: 0.0, ["entropy"])


def test_one_exit_has_curves_of_the_criteria_that_compare_no_exits():
    logits = logits_of_classes(np.array([[0, 1, 1]]))
    names = {curve.name for curve in curves(logits, lambda exit_logits: 1.0, count=3)}
    assert {"fixed_layer", "entropy"} <= names and "patience" not in names
    with pytest.raises(InputError, match="patience cannot be swept on a model whose number of ex"):
        curves(logits, lambda exit_logits: 1.0, ["patience"])


def test_the_curves_do_not_depend_on_how_many_settings_are_replayed_at_once(monkeypatch):
    logits = logits_of_classes(np.random.default_rng(3).integers(0, 2, (4, 20)))
    share = lambda exit_logits: float(exit_logits.argmax(axis=1).mean())  # noqa: E731
    (expected,) = curves(logits, share, ["patience"])
    monkeypatch.setattr("pabee_jax.analysis.curves._VALUES_AT_ONCE", 2 * logits[0].size)
    (curve,) = curves(logits, share, ["patience"])
    assert curve.points == expected.points


def test_only_the_named_criteria_have_curves():
    logits = logits_of_classes(np.random.default_rng(2).integers(0, 2, (3, 20)))
    (curve,) = curves(logits, lambda exit_logits: 1.0, ["entropy"], count=5)
    assert all(isinstance(setting, Entropy) for setting in curve.settings)
    with pytest.raises(InputError, match="unknown exit criterion 'hunch'"):
        curves(logits, lambda exit_logits: 1.0, ["hunch"])
