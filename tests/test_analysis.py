"""What the exits know, against figures worked out by hand."""

import numpy as np
import pytest

from pabee_jax.analysis import exits
from pabee_jax.analysis.curves import Curve, curves
from pabee_jax.criteria import Entropy, FixedLayer, Patience
from pabee_jax.errors import InputError


def of_classes(table):
    """Logits of exits whose prediction is the table's class, (exits, rows, 2)."""
    table = np.asarray(table)
    return np.stack([1 - table, table], axis=2).astype(np.float32)


def test_calibration_error_by_hand():
    # Four rows at confidence 0.75 of which two are right, one at 0.95 that is right:
    # 4/5 * |0.5 - 0.75| + 1/5 * |1 - 0.95| = 0.21.
    confidence = np.array([0.75, 0.75, 0.75, 0.75, 0.95])
    logits = np.stack([np.zeros(5), np.log(confidence / (1 - confidence))], axis=1)
    labels = np.array([1, 1, 0, 0, 1])
    error = exits.expected_calibration_error(logits.astype(np.float32), labels)
    assert error == pytest.approx(0.21, abs=1e-6)


def test_certainty_that_is_right_has_no_calibration_error():
    logits = np.array([[1e4, -1e4], [-1e4, 1e4]], np.float32)
    assert exits.expected_calibration_error(logits, np.array([0, 1])) == 0


def test_overthinking_by_hand():
    # Rows: always right; right until exit 2; right from exit 3 on; never right.
    right = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0]], bool)
    found = exits.overthinking(right)
    assert found.lost.tolist() == [0.25, 0.25, 0]
    assert found.won.tolist() == [0.25, 0.25, 0]
    assert found.ever_lost == 0.25
    assert found.layers_after == pytest.approx((2 + 2 + 0) / 3)


def test_nothing_is_ever_right():
    found = exits.overthinking(np.zeros((3, 4), bool))
    assert (found.ever_lost, found.layers_after) == (0, 0)


def test_a_score_is_right_within_the_tolerance():
    logits = np.array([[1.0, 2.0], [1.5, 3.0]], np.float32)[..., None]
    labels = np.array([1.5, 2.0], np.float32)
    assert exits.right_at(logits, labels, 0.5).tolist() == [[True, True], [True, False]]


def test_agreement_of_exits():
    logits = of_classes([[0, 0, 1, 1], [0, 0, 1, 0], [1, 1, 0, 0]])
    assert exits.agreement_of_exits(logits).tolist() == [
        [1, 0.75, 0],
        [0.75, 1, 0.25],
        [0, 0.25, 1],
    ]
    scores = np.array([[0, 1, 2], [0, 2, 4], [2, 1, 0], [5, 5, 5]], np.float32)[..., None]
    found = exits.agreement_of_exits(scores)
    np.testing.assert_allclose(found[0, :3], [1, 1, -1], atol=1e-6)
    assert np.isnan(found[0, 3])


def test_shares_and_difficulty():
    layers = [np.array([1, 1, 3]), np.array([2, 1, 3])]
    assert exits.exit_shares(layers, 3).tolist() == pytest.approx(
        np.array([[2 / 3, 0, 1 / 3], [1 / 3, 1 / 3, 1 / 3]])
    )
    order, mean = exits.by_difficulty(layers)
    assert order.tolist() == [1, 0, 2] and mean.tolist() == [1.5, 1, 3]


def accuracy(labels):
    return lambda logits: float((logits.argmax(axis=1) == labels).mean())


def test_a_curve_is_read_between_its_settings():
    curve = Curve("x", [None, None], np.array([3.0, 2.0]), np.array([0.9, 0.7]), (0.5, 1.0), 4)
    assert curve.at(0.25) == pytest.approx(0.9)
    assert curve.at(0.375) == pytest.approx(0.8)  # Half-way between the two settings.
    assert curve.at(0.125) == pytest.approx(0.95)  # Between the slower one and full depth.
    # Trapezia 1-2, 2-3, 3-4: (0.6 + 0.8 + 0.95) / 3.
    assert curve.area == pytest.approx(2.35 / 3)


def test_every_fitting_criterion_has_a_curve_from_slow_to_fast():
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 200)
    logits = random.normal(size=(6, 200, 3)).astype(np.float32)
    logits += np.arange(6)[:, None, None] * np.eye(3, dtype=np.float32)[labels]
    found = curves(logits, accuracy(labels), count=20)
    names = {curve.name.partition(",")[0] for curve in found}
    assert names == {
        *("patience", "fixed_layer", "vote", "entropy", "max_probability", "margin"),
        *("patient_confidence", "divergence"),
    }
    for curve in found:
        assert (np.diff(curve.mean_exit_layers) <= 1e-6).all(), curve.name
        assert curve.ends == (accuracy(labels)(logits[0]), accuracy(labels)(logits[-1]))
    fixed = next(curve for curve in found if curve.name == "fixed_layer")
    for setting, layer, score in zip(
        fixed.settings, fixed.mean_exit_layers, fixed.scores, strict=True
    ):
        assert layer == setting.layer and score == accuracy(labels)(logits[setting.layer - 1])


def test_scores_have_the_curves_that_fit_them():
    random = np.random.default_rng(1)
    logits = random.normal(size=(4, 50, 1)).astype(np.float32)
    # A correlation that is not defined counts as none.
    found = curves(logits, lambda answers: float("nan"), count=5)
    assert {type(curve.settings[0]) for curve in found} == {Patience, FixedLayer}
    assert all(curve.area == 0 for curve in found)
    with pytest.raises(InputError, match="Entropy is for classification"):
        curves(logits, lambda answers: 0.0, ["entropy"])


def test_only_the_named_curves():
    logits = of_classes(np.random.default_rng(2).integers(0, 2, (3, 20)))
    (curve,) = curves(logits, lambda answers: 1.0, ["entropy"], count=5)
    assert all(isinstance(setting, Entropy) for setting in curve.settings)
    with pytest.raises(InputError, match="unknown exit criterion 'hunch'"):
        curves(logits, lambda answers: 1.0, ["hunch"])
