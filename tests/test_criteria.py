"""`Patience` against a plain Python loop, and the interface that all criteria share."""

import dataclasses

import jax
import numpy as np
import pytest

from pabee_jax import InputError, MaxProbability, Patience, replay
from pabee_jax.criteria import (
    Entropy,
    Oracle,
    PatientConfidence,
    as_arrays,
    check,
    from_config,
    registered,
    to_config,
)
from pabee_jax.drivers import replay as replay_module

EXITS, ROWS = 7, 400


def patience_in_plain_python(logits, patience, threshold):
    """Return exit layers and logits by the rule of the paper, section 3.2, one row at a time."""
    exits, rows, classes = logits.shape
    layers, answers = [], []
    for row in range(rows):
        counter, previous = 0, None
        for layer in range(1, exits + 1):
            values = [float(value) for value in logits[layer - 1, row]]
            if classes == 1:
                prediction = values[0]
                agree = previous is not None and abs(
                    np.float32(prediction) - np.float32(previous)
                ) < np.float32(threshold)
            else:
                prediction = values.index(max(values))
                agree = previous is not None and prediction == previous
            counter = counter + 1 if agree else 0
            previous = prediction
            if (patience > 0 and counter == patience) or layer == exits:
                layers.append(layer)
                answers.append(values)
                break
    return np.array(layers), np.array(answers, np.float32)


def random_logits(classes, seed=0):
    """Return logits that are small integers, so that ties are frequent; scores in steps of 0.25."""
    values = np.random.default_rng(seed).integers(0, 4, (EXITS, ROWS, classes))
    return (values * (0.25 if classes == 1 else 1.0)).astype(np.float32)


@pytest.mark.parametrize("classes", [1, 2, 3])
@pytest.mark.parametrize("patience", range(EXITS + 2))
def test_replay_equals_a_plain_python_loop(classes, patience):
    logits = random_logits(classes)
    # With the threshold 0.25, two scores that differ by exactly 0.25 do not agree.
    for threshold in (0.0, 0.25, 0.3) if classes == 1 else (0.0,):
        exits, answers = replay(Patience(patience, threshold), logits)
        expected_exits, expected_answers = patience_in_plain_python(logits, patience, threshold)
        np.testing.assert_array_equal(exits, expected_exits)
        np.testing.assert_array_equal(answers, expected_answers)


def test_the_random_logits_have_ties_and_differences_equal_to_a_threshold():
    logits = random_logits(3)
    assert ((logits == logits.max(axis=2, keepdims=True)).sum(axis=2) > 1).mean() > 0.2
    steps = np.abs(np.diff(random_logits(1)[..., 0], axis=0))
    assert (steps == 0.25).any() and (steps < 0.25).any() and (steps > 0.3).any()


def test_the_earliest_exit_layer_is_patience_plus_one():
    constant = np.tile(np.float32([0, 1]), (EXITS, 1, 1))
    for patience in range(1, EXITS):
        assert replay(Patience(patience), constant)[0].tolist() == [patience + 1]
    assert replay(Patience(0), constant)[0].tolist() == [EXITS]


def test_all_settings_share_one_compiled_program():
    logits = random_logits(2, seed=1)[:, :11]
    before = replay_module._replay_one._cache_size()
    for patience in (0, 1, np.int64(2), np.int32(3), 100):
        for threshold in (0, 0.5, np.float32(1), np.float64(2)):
            replay(Patience(patience, threshold), logits)
    compilations = replay_module._replay_one._cache_size() - before
    assert compilations == 1, f"{compilations} compilations; settings must not be static arguments"


def test_a_criterion_is_a_pytree_whose_leaves_are_its_fields():
    leaves, structure = jax.tree.flatten(as_arrays(Patience(np.int64(6), 1)))
    assert [leaf.dtype for leaf in leaves] == [np.int32, np.float32]
    assert jax.tree.unflatten(structure, [None, None]).patience is None


def test_classes_with_the_same_fields_have_different_tree_structures():
    # The caches of `jit` compare the tree structures of the arguments.
    @registered()
    @dataclasses.dataclass(frozen=True)
    class Mine(MaxProbability):
        pass

    assert jax.tree.structure(Mine(0.5)) != jax.tree.structure(MaxProbability(0.5))
    assert jax.tree.structure(Mine(0.5)) == jax.tree.structure(Mine(0.25))


def test_a_class_registered_with_register_dataclass_is_refused():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Mine(MaxProbability):
        pass

    with pytest.raises(InputError, match=r"Mine .*with @pabee_jax.criteria.registered\(\)"):
        replay(Mine(0.5), random_logits(2))


def test_from_config_is_the_inverse_of_to_config():
    criterion = Patience(6, 0.1)
    assert from_config(to_config(criterion)) == criterion
    with pytest.raises(InputError, match="unknown exit criterion 'hunch'; known are divergence"):
        from_config({"criterion": "hunch"})
    with pytest.raises(InputError, match="does not fit"):
        from_config({"criterion": "patience", "patience": 1, "votes": 2})


@pytest.mark.parametrize("patience", [-1, 1.5, "3", True, float("nan"), 2**31])
def test_an_invalid_patience_is_refused(patience):
    with pytest.raises(InputError, match="whole number, 0 or more"):
        Patience(patience)


def test_an_invalid_regression_threshold_is_refused():
    with pytest.raises(InputError, match="must be a number"):
        Patience(1, float("nan"))
    with pytest.raises(InputError, match="must be a number"):
        Patience(1, "0.1")


def test_settings_without_an_early_exit_have_a_warning():
    assert Patience(2).warnings(12, False) == []
    assert "no early exit" in Patience(11).warnings(12, False)[0]
    assert "no early exit; it must be above 0" in Patience(3, 0.0).warnings(12, True)[0]
    assert Patience(3, 0.1).warnings(12, True) == []


@pytest.mark.parametrize("shape", [(3, 4), (0, 4, 2), (3, 0, 2)])
def test_replay_refuses_logits_of_other_shapes(shape):
    with pytest.raises(InputError, match="exits, rows, classes"):
        replay(Patience(1), np.zeros(shape))


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (np.full((3, 4, 2), np.nan), "the logits of exit 1 are NaN in row 0"),
        (np.ones((3, 4, 2), complex), "must be real numbers, not complex128"),
        (np.ones((3, 4, 2), bool), "must be real numbers, not bool"),
        (np.full((3, 4, 2), "1.0"), "must be real numbers, not <U3"),
        (np.ones((3, 4, 2), object), "must be real numbers, not object"),
    ],
)
def test_replay_refuses_logits_that_are_no_numbers(logits, message):
    with pytest.raises(InputError, match=message):
        replay(Patience(1), logits)


def test_integer_and_infinite_logits_are_numbers():
    logits = np.array([[[0, 1]], [[0, 1]], [[3, 1]]])
    assert replay(Patience(1), logits)[0].tolist() == [2]
    assert replay(Patience(1), np.where(logits, np.inf, logits))[0].tolist() == [2]


def test_the_oracle_needs_one_label_per_row():
    logits = np.eye(3)[None].repeat(2, axis=0)  # Row i is of class i at both exits.
    # A compiled program would take the last label for the rows that have none.
    for labels in ([0], [0, 1, 2, 0], np.zeros((3, 1), int)):
        with pytest.raises(InputError, match="the logits have 3 rows: it needs one label per row"):
            replay(Oracle(labels), logits)
    assert replay(Oracle([0, 0, 2]), logits)[0].tolist() == [1, 2, 1]
    with pytest.raises(InputError, match=r"Oracle.labels is .* it must be made of numbers"):
        replay(Oracle(["a", "b", "c"]), logits)


def test_a_criterion_for_classification_is_refused_for_one_output():
    with pytest.raises(InputError, match="Entropy is for classification"):
        replay(Entropy(0.5), np.zeros((3, 4, 1)))


@pytest.mark.parametrize("value", [None, [1], (1, 2), {"a": 1}, np.array([1, 2]), np.array("1")])
def test_a_field_that_is_no_number_is_refused_before_it_is_used(value):
    for criterion in (Patience(value), PatientConfidence(1, value)):
        with pytest.raises(InputError, match=r"(patience|threshold) is .*; it must be a number"):
            check(criterion, EXITS, 2)
        with pytest.raises(InputError, match="it must be a number"):
            replay(criterion, np.zeros((2, 2, 2)))


def test_a_threshold_of_hundreds_of_digits_is_refused():
    with pytest.raises(InputError, match="regression_threshold must be a number, not 1000"):
        Patience(1, 10**400)
