"""`Patience` is the paper's rule, whatever runs it."""

import dataclasses

import jax
import numpy as np
import pytest

from pabee_jax import InputError, MaxProbability, Patience, replay
from pabee_jax.criteria import as_arrays, from_config, registered, to_config
from pabee_jax.drivers import replay as replay_module

EXITS, ROWS = 7, 400


def patience_in_plain_python(logits, patience, threshold):
    """One row at a time, as section 3.2 of the paper says it."""
    exits, rows, classes = logits.shape
    layers, answers = [], []
    for row in range(rows):
        counter, previous = 0, None
        for layer in range(1, exits + 1):
            values = [float(value) for value in logits[layer - 1, row]]
            if classes == 1:
                answer = values[0]
                agree = previous is not None and abs(
                    np.float32(answer) - np.float32(previous)
                ) < np.float32(threshold)
            else:
                answer = values.index(max(values))
                agree = previous is not None and answer == previous
            counter = counter + 1 if agree else 0
            previous = answer
            if (patience > 0 and counter == patience) or layer == exits:
                layers.append(layer)
                answers.append(values)
                break
    return np.array(layers), np.array(answers, np.float32)


def random_logits(classes, seed=0):
    """Small integers, so that ties between classes are frequent; steps of 0.25 for scores."""
    values = np.random.default_rng(seed).integers(0, 4, (EXITS, ROWS, classes))
    return (values * (0.25 if classes == 1 else 1.0)).astype(np.float32)


@pytest.mark.parametrize("classes", [1, 2, 3])
@pytest.mark.parametrize("patience", range(EXITS + 2))
def test_replay_equals_a_plain_python_loop(classes, patience):
    logits = random_logits(classes)
    # 0.25 stands on the threshold: a difference of exactly that much is no agreement.
    for threshold in (0.0, 0.25, 0.3) if classes == 1 else (0.0,):
        exits, answers = replay(Patience(patience, threshold), logits)
        expected_exits, expected_answers = patience_in_plain_python(logits, patience, threshold)
        np.testing.assert_array_equal(exits, expected_exits)
        np.testing.assert_array_equal(answers, expected_answers)


def test_ties_and_thresholds_are_really_there():
    logits = random_logits(3)
    assert ((logits == logits.max(axis=2, keepdims=True)).sum(axis=2) > 1).mean() > 0.2
    steps = np.abs(np.diff(random_logits(1)[..., 0], axis=0))
    assert (steps == 0.25).any() and (steps < 0.25).any() and (steps > 0.3).any()


def test_the_earliest_exit_is_patience_plus_one():
    constant = np.tile(np.float32([0, 1]), (EXITS, 1, 1))
    for patience in range(1, EXITS):
        assert replay(Patience(patience), constant)[0].tolist() == [patience + 1]
    assert replay(Patience(0), constant)[0].tolist() == [EXITS]


def test_one_program_serves_every_setting():
    logits = random_logits(2, seed=1)[:, :11]
    before = replay_module._replay_one._cache_size()
    for patience in (0, 1, np.int64(2), np.int32(3), 100):
        for threshold in (0, 0.5, np.float32(1), np.float64(2)):
            replay(Patience(patience, threshold), logits)
    assert replay_module._replay_one._cache_size() - before == 1, "a new patience recompiled"


def test_is_a_pytree_whose_thresholds_are_leaves():
    leaves, structure = jax.tree.flatten(as_arrays(Patience(np.int64(6), 1)))
    assert [leaf.dtype for leaf in leaves] == [np.int32, np.float32]
    assert jax.tree.unflatten(structure, [None, None]).patience is None


def test_classes_with_the_same_leaves_are_told_apart():
    # jit's caches compare the structures of what they are given.
    @registered()
    @dataclasses.dataclass(frozen=True)
    class Mine(MaxProbability):
        pass

    assert jax.tree.structure(Mine(0.5)) != jax.tree.structure(MaxProbability(0.5))
    assert jax.tree.structure(Mine(0.5)) == jax.tree.structure(Mine(0.25))


def test_refuses_a_class_that_jit_may_mistake_for_another():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Mine(MaxProbability):
        pass

    with pytest.raises(InputError, match=r"Mine .*with @pabee_jax.criteria.registered\(\)"):
        replay(Mine(0.5), random_logits(2))


def test_survives_config_json():
    criterion = Patience(6, 0.1)
    assert from_config(to_config(criterion)) == criterion
    with pytest.raises(InputError, match="unknown exit criterion 'hunch'; known are divergence"):
        from_config({"criterion": "hunch"})
    with pytest.raises(InputError, match="does not fit"):
        from_config({"criterion": "patience", "patience": 1, "votes": 2})


@pytest.mark.parametrize("patience", [-1, 1.5, "3", True, float("nan"), 2**31])
def test_refuses_what_is_no_patience(patience):
    with pytest.raises(InputError, match="whole number, 0 or more"):
        Patience(patience)


def test_refuses_what_is_no_threshold():
    with pytest.raises(InputError, match="must be a number"):
        Patience(1, float("nan"))
    with pytest.raises(InputError, match="must be a number"):
        Patience(1, "0.1")


def test_says_what_saves_nothing():
    assert Patience(2).warnings(12, False) == []
    assert "saves nothing" in Patience(11).warnings(12, False)[0]
    assert "ever exits" in Patience(3, 0.0).warnings(12, True)[0]
    assert Patience(3, 0.1).warnings(12, True) == []


@pytest.mark.parametrize("shape", [(3, 4), (0, 4, 2), (3, 0, 2)])
def test_replay_refuses_other_shapes(shape):
    with pytest.raises(InputError, match="exits, rows, classes"):
        replay(Patience(1), np.zeros(shape))
