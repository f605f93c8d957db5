"""Every criterion is its paper's rule: against plain Python, one row at a time."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from pabee_jax import InputError, replay
from pabee_jax.criteria import (
    CRITERIA,
    Divergence,
    Entropy,
    FixedLayer,
    Margin,
    MaxProbability,
    Oracle,
    Patience,
    PatientConfidence,
    Vote,
    check,
    from_config,
    to_config,
)
from pabee_jax.drivers.replay import replay_many

EXITS, ROWS = 6, 200
# Probabilities closer than this to a threshold are left out: float32 decides them.
CLOSE = 1e-5


def softmax(values):
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def entropy(values):
    return -sum(p * math.log(p) for p in softmax(values) if p > 0) / math.log(len(values))


def jensen_shannon(first, second):
    p, q = softmax(first), softmax(second)
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]

    def kl(x):
        return sum(a * math.log(a / b) for a, b in zip(x, m, strict=True) if a > 0)

    return kl(p) / 2 + kl(q) / 2


def argmax(values):
    return values.index(max(values))


class Reference:
    """One row at a time: the exit layer, its answer, and how close the closest decision was."""

    def __init__(self, rule):
        self.rule = rule  # (logits of the exits so far) -> (leaves?, answer, distance)

    def __call__(self, logits):
        layers, answers, distances = [], [], []
        for row in range(logits.shape[1]):
            seen, closest = [], math.inf
            for layer in range(1, len(logits) + 1):
                seen.append([float(value) for value in logits[layer - 1, row]])
                leaves, answer, distance = self.rule(seen)
                closest = min(closest, distance)
                if leaves or layer == len(logits):
                    break
            layers.append(layer)
            answers.append(answer if leaves else seen[-1])
            distances.append(closest)
        return np.array(layers), np.array(answers), np.array(distances)


def below(value_of, threshold):
    def rule(seen):
        value = value_of(seen)
        return value < threshold, seen[-1], abs(value - threshold)

    return rule


def above(value_of, threshold):
    def rule(seen):
        value = value_of(seen)
        return value > threshold, seen[-1], abs(value - threshold)

    return rule


def running(values_of, threshold, times):
    def rule(seen):
        values = values_of(seen)[-times:]
        leaves = len(values) == times and all(value < threshold for value in values)
        distance = min((abs(value - threshold) for value in values), default=math.inf)
        return leaves, seen[-1], distance

    return rule


def vote(votes):
    def rule(seen):
        classes = [argmax(values) for values in seen]
        for choice in range(len(seen[0])):
            voters = [values for values, one in zip(seen, classes, strict=True) if one == choice]
            if len(voters) >= votes:
                return (
                    True,
                    [sum(column) / len(voters) for column in np.transpose(voters)],
                    math.inf,
                )
        return False, None, math.inf

    return rule


def top_two_difference(seen):
    first, second = sorted(softmax(seen[-1]))[-1:-3:-1]
    return first - second


def neighbours(seen):
    return [jensen_shannon(*pair) for pair in itertools.pairwise(seen)]


CASES = [
    *[(Entropy(t), below(lambda seen: entropy(seen[-1]), t)) for t in (0.0, 0.3, 0.7, 1.0)],
    *[
        (MaxProbability(t), above(lambda seen: max(softmax(seen[-1])), t))
        for t in (0.0, 0.45, 0.8, 1.0)
    ],
    *[(Margin(t), above(top_two_difference, t)) for t in (0.0, 0.2, 0.6, 1.0)],
    *[
        (
            PatientConfidence(patience, t),
            running(lambda seen: [entropy(values) for values in seen], t, patience),
        )
        for patience in (1, 2, 3, 6, 7)
        for t in (0.5, 0.9)
    ],
    *[
        (Divergence(patience, t), running(neighbours, t, patience))
        for patience in (1, 2, 5, 6)
        for t in (0.02, 0.1, 0.5)
    ],
    *[(Vote(votes), vote(votes)) for votes in (1, 2, 3, 6, 7)],
    *[
        (FixedLayer(layer), lambda seen, layer=layer: (len(seen) == layer, seen[-1], math.inf))
        for layer in (1, 3, 6, 9)
    ],
]


def random_logits(classes, scale=1.5, seed=0):
    return scale * np.random.default_rng(seed).normal(size=(EXITS, ROWS, classes)).astype("f4")


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize(("criterion", "rule"), CASES, ids=[str(one) for one, _ in CASES])
def test_equals_plain_python(criterion, rule, classes):
    logits = random_logits(classes)
    expected, answers, distances = Reference(rule)(logits)
    clear = distances > CLOSE
    assert clear.mean() > 0.98
    found, ours = map(np.asarray, replay(criterion, logits))
    np.testing.assert_array_equal(found[clear], expected[clear])
    np.testing.assert_allclose(ours[clear], answers[clear], rtol=1e-5, atol=1e-6)


def test_ties_go_to_the_lowest_class():
    # Exits 1 and 2 tie between classes 0 and 1: both count for class 0.
    logits = np.array([[[2, 2, 0]], [[1, 1, 1]], [[0, 5, 0]]], np.float32)
    layer, answer = replay(Vote(2), logits)
    assert layer.tolist() == [2]
    np.testing.assert_allclose(answer, [[1.5, 1.5, 0.5]])
    assert replay(Margin(0.0), logits)[0].tolist() == [3], "equal probabilities have no margin"


def test_the_earliest_exits():
    same = np.tile(np.float32([[9.0, 0.0]]), (EXITS, 1, 1))
    for patience in (1, 2, 3):
        assert replay(PatientConfidence(patience, 0.5), same)[0].tolist() == [patience]
        assert replay(Divergence(patience, 0.1), same)[0].tolist() == [patience + 1]
        assert replay(Patience(patience), same)[0].tolist() == [patience + 1]
        assert replay(Vote(patience), same)[0].tolist() == [patience]


@pytest.mark.parametrize("criterion", [one for one, _ in CASES], ids=str)
def test_extreme_logits_give_no_nan(criterion):
    extreme = np.array([[1e4, -1e4], [-1e4, 1e4], [0, 0], [1e4, 1e4], [-1e4, -1e4]], np.float32)
    logits = np.stack([np.roll(extreme, shift, axis=0) for shift in range(EXITS)])
    layers, answers = replay(criterion, logits)
    assert np.isfinite(answers).all() and ((layers >= 1) & (layers <= EXITS)).all()
    state = criterion.init(jnp.zeros((5, 2)), jnp.arange(5))
    for layer in range(EXITS):
        state, _ = criterion.update(state, jnp.asarray(logits[layer]), layer + 1)
        for leaf in np.atleast_1d(*[state] if not isinstance(state, tuple) else [0]):
            assert np.isfinite(leaf).all()


def test_oracle_is_the_first_right_exit():
    logits = random_logits(3)
    labels = np.random.default_rng(1).integers(0, 3, ROWS)
    right = logits.argmax(axis=2) == labels
    expected = np.where(right.any(axis=0), right.argmax(axis=0) + 1, EXITS)
    layers, answers = map(np.asarray, replay(Oracle(labels), logits))
    np.testing.assert_array_equal(layers, expected)
    np.testing.assert_array_equal(answers.argmax(axis=1) == labels, right.any(axis=0))


def test_oracle_of_scores_has_a_tolerance():
    logits = np.array([[[1.0]], [[1.75]], [[2.25]]], np.float32)
    assert [
        replay(Oracle(np.float32([2.0]), tolerance), logits)[0].item()
        for tolerance in (0.0, 0.2, 0.25, 1.0)
    ] == [3, 3, 2, 1]


def test_a_fixed_layer_of_scores():
    logits = random_logits(1)
    layers, answers = replay(FixedLayer(4), logits)
    assert (np.asarray(layers) == 4).all()
    np.testing.assert_array_equal(answers, logits[3])


@pytest.mark.parametrize("kind", [Entropy, MaxProbability, Margin])
@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan"), "0.5", True])
def test_refuses_thresholds_outside_their_range(kind, threshold):
    with pytest.raises(InputError, match="threshold must be a number from 0 to 1"):
        kind(threshold)


@pytest.mark.parametrize(
    "make",
    [
        lambda: PatientConfidence(0, 0.5),
        lambda: Divergence(0, 0.1),
        lambda: Vote(0),
        lambda: FixedLayer(0),
        lambda: Vote(1.5),
    ],
)
def test_refuses_counts_below_one(make):
    with pytest.raises(InputError, match="must be a whole number, 1 or more"):
        make()


def test_labels_and_classes_are_needed_where_they_are():
    with pytest.raises(InputError, match="Oracle needs the labels: it works on recorded logits"):
        check(Oracle(np.zeros(3, np.int32)), False)
    with pytest.raises(InputError, match="Entropy is for classification; for scores .* Patience"):
        check(Entropy(0.5), True)
    for criterion in (Patience(3), FixedLayer(2)):
        check(criterion, True)


def test_every_criterion_can_be_kept_in_a_checkpoint():
    kinds = {type(criterion) for criterion, _ in CASES} | {Patience}
    assert kinds == set(CRITERIA.values()), "a new criterion belongs into CASES"
    for criterion, _ in CASES:
        assert from_config(to_config(criterion)) == criterion


def test_many_settings_are_as_one_by_one():
    logits = random_logits(3)
    for settings in (
        [Entropy(t) for t in np.linspace(0, 1, 70)],
        [Divergence(1 + p % 4, p / 50) for p in range(5)],
        [Vote(2)],
    ):
        layers, answers = replay_many(settings, logits)
        for index, setting in enumerate(settings):
            expected_layers, expected = replay(setting, logits)
            np.testing.assert_array_equal(layers[index], expected_layers, str(setting))
            np.testing.assert_array_equal(answers[index], expected, str(setting))
    with pytest.raises(InputError, match="settings of one criterion"):
        replay_many([Entropy(0.5), Vote(2)], logits)
    with pytest.raises(InputError, match="at least one"):
        replay_many([], logits)
