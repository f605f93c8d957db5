"""Every criterion against its paper's rule in plain Python, one row at a time."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pabee_jax import InputError, replay
from pabee_jax.criteria import (
    CRITERIA,
    Consistency,
    Divergence,
    Energy,
    Ensemble,
    Entropy,
    FixedLayer,
    Margin,
    MaxProbability,
    Oracle,
    Patience,
    PatientConfidence,
    Vote,
    Window,
    check,
    from_config,
    parse,
    to_config,
)
from pabee_jax.drivers.replay import replay_many

EXITS, ROWS = 6, 200
# Rows with a measure closer to the threshold than this are not compared, because float32 rounding
# decides on which side of the threshold they are.
CLOSE = 1e-5


def softmax(values):
    exponentials = [math.exp(value - max(values)) for value in values]
    return [exponential / sum(exponentials) for exponential in exponentials]


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
    """Applies a rule one row at a time.

    Returns the exit layers, the answers, and for every row the smallest distance between a measure
    and the threshold.

    Attributes:
        rule: a function from the logits of the exits so far to (whether the row exits, the answer,
            the distance between the measure and the threshold).
    """

    def __init__(self, rule):
        self.rule = rule

    def __call__(self, logits):
        exit_layers, answers, distances = [], [], []
        for row in range(logits.shape[1]):
            history, smallest = [], math.inf
            for layer in range(1, len(logits) + 1):
                history.append([float(value) for value in logits[layer - 1, row]])
                exits, answer, distance = self.rule(history)
                smallest = min(smallest, distance)
                if exits or layer == len(logits):
                    break
            exit_layers.append(layer)
            answers.append(answer if exits else history[-1])
            distances.append(smallest)
        return np.array(exit_layers), np.array(answers), np.array(distances)


def below(measure, threshold):
    def rule(history):
        value = measure(history)
        return value < threshold, history[-1], abs(value - threshold)

    return rule


def above(measure, threshold):
    def rule(history):
        value = measure(history)
        return value > threshold, history[-1], abs(value - threshold)

    return rule


def consecutively_below(measures, threshold, patience):
    def rule(history):
        values = measures(history)[-patience:]
        exits = len(values) == patience and all(value < threshold for value in values)
        distance = min((abs(value - threshold) for value in values), default=math.inf)
        return exits, history[-1], distance

    return rule


def vote(votes):
    def rule(history):
        for candidate in range(len(history[0])):
            voters = [logits for logits in history if argmax(logits) == candidate]
            if len(voters) >= votes:
                return (
                    True,
                    [sum(column) / len(voters) for column in np.transpose(voters)],
                    math.inf,
                )
        return False, None, math.inf

    return rule


def window_vote(votes, window):
    def rule(history):
        voted = [argmax(logits) for logits in history[-window:]]
        return max(map(voted.count, voted)) >= votes, history[-1], math.inf

    return rule


def ensemble(threshold):
    """BEEM: the weighted confidences of the latest exits that agree, added from exit to exit."""

    def rule(history):
        total, previous = 0.0, None
        for layer, logits in enumerate(history, start=1):
            weighted = 0.1 * layer * max(softmax(logits))
            total = total + weighted if argmax(logits) == previous else weighted
            previous = argmax(logits)
        return total > threshold, history[-1], abs(total - threshold)

    return rule


def consistency(coefficients):
    """The logistic function of the predicted class, the margin and the earlier exits' margins."""

    def margin(values, label):
        return values[label] - max(value for i, value in enumerate(values) if i != label)

    def measure(history):
        weights, label = coefficients[len(history) - 1], argmax(history[-1])
        earlier = [margin(values, label) for values in history[:-1]]
        score = weights[label] + weights[-2] * margin(history[-1], label)
        score += weights[-1] * (sum(earlier) / len(earlier) if earlier else 0.0)
        return 1 / (1 + math.exp(-score))

    return measure


def energy(temperature):
    def measure(history):
        return -temperature * math.log(sum(math.exp(z / temperature) for z in history[-1]))

    return measure


def top_two_difference(history):
    first, second = sorted(softmax(history[-1]))[-1:-3:-1]
    return first - second


def divergences(history):
    return [jensen_shannon(*pair) for pair in itertools.pairwise(history)]


CASES = [
    *[(Entropy(t), below(lambda history: entropy(history[-1]), t)) for t in (0.0, 0.3, 0.7, 1.0)],
    *[
        (MaxProbability(t), above(lambda history: max(softmax(history[-1])), t))
        for t in (0.0, 0.45, 0.8, 1.0)
    ],
    *[(Margin(t), above(top_two_difference, t)) for t in (0.0, 0.2, 0.6, 1.0)],
    *[
        (
            PatientConfidence(patience, t),
            consecutively_below(
                lambda history: [entropy(logits) for logits in history], t, patience
            ),
        )
        for patience in (1, 2, 3, 6, 7)
        for t in (0.5, 0.9)
    ],
    *[
        (Divergence(patience, t), consecutively_below(divergences, t, patience))
        for patience in (1, 2, 5, 6)
        for t in (0.02, 0.1, 0.5)
    ],
    *[(Vote(votes), vote(votes)) for votes in (1, 2, 3, 6, 7)],
    *[
        (Window(votes, window), window_vote(votes, window))
        for votes, window in [(1, 1), (2, 2), (2, 3), (3, 4), (3, 31), (4, 3)]
    ],
    *[(Ensemble(t), ensemble(t)) for t in (0.0, 0.2, 0.5, 1.0, 3.0)],
    *[(Energy(t), below(energy(1.0), t)) for t in (-4.0, -2.5, -1.5, 0.5)],
    *[(Energy(t, 3.0), below(energy(3.0), t)) for t in (-4.0, -3.0)],
    *[
        (
            FixedLayer(layer),
            lambda history, layer=layer: (len(history) == layer, history[-1], math.inf),
        )
        for layer in (1, 3, 6, 9)
    ],
]


def random_logits(classes, scale=1.5, seed=0):
    return scale * np.random.default_rng(seed).normal(size=(EXITS, ROWS, classes)).astype("f4")


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize(("criterion", "rule"), CASES, ids=[str(case[0]) for case in CASES])
def test_replay_equals_the_rule_in_plain_python(criterion, rule, classes):
    logits = random_logits(classes)
    expected_layers, expected_answers, distances = Reference(rule)(logits)
    clear = distances > CLOSE
    assert clear.mean() > 0.98, "too many rows are close to the threshold; change the threshold"
    exit_layers, answers = map(np.asarray, replay(criterion, logits))
    np.testing.assert_array_equal(exit_layers[clear], expected_layers[clear])
    np.testing.assert_allclose(answers[clear], expected_answers[clear], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.8, 0.97, 1.0])
def test_consistency_equals_the_rule_in_plain_python(classes, threshold):
    coefficients = np.random.default_rng(3).normal(size=(EXITS, classes + 2)).round(2).tolist()
    logits = random_logits(classes)
    rule = above(consistency(coefficients), threshold)
    expected_layers, expected_answers, distances = Reference(rule)(logits)
    clear = distances > CLOSE
    assert clear.mean() > 0.98
    exit_layers, answers = map(np.asarray, replay(Consistency(threshold, coefficients), logits))
    np.testing.assert_array_equal(exit_layers[clear], expected_layers[clear])
    np.testing.assert_allclose(answers[clear], expected_answers[clear], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 3])
def test_consistency_is_fitted_to_the_share_of_rows_that_have_the_final_prediction(classes):
    """The maximum of the likelihood: an exit's probabilities add up to its consistent rows."""
    random = np.random.default_rng(0)
    labels = random.integers(0, classes, 500)
    logits = random.normal(size=(EXITS, 500, classes)).astype(np.float32)
    logits += np.arange(EXITS)[:, None, None] * np.eye(classes, dtype=np.float32)[labels]
    table = Consistency.fit(logits).coefficients.tolist()
    measure = consistency(table)
    last = logits[-1].argmax(axis=1)
    for layer in range(1, EXITS):
        probabilities = [measure(logits[:layer, row].tolist()) for row in range(500)]
        consistent = (logits[layer - 1].argmax(axis=1) == last).sum()
        assert sum(probabilities) == pytest.approx(consistent, abs=1)
    # Every row has the final prediction at the last exit: Laplace's rule, 501 to 1.
    assert table[-1][:classes] == pytest.approx([math.log(501)] * classes)
    # No exit is before the first one.
    assert table[0][-2] != 0 and table[0][-1] == pytest.approx(0, abs=1e-6)


def test_a_fit_depends_on_its_rows_and_on_the_regularization():
    logits = random_logits(2)
    assert Consistency.fit(logits) == Consistency.fit(logits.copy())
    assert Consistency.fit(logits) != Consistency.fit(logits[:, :100])
    stronger = Consistency.fit(logits, regularization=100.0)
    assert abs(stronger.coefficients[0, -2]) < abs(Consistency.fit(logits).coefficients[0, -2])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Consistency(1.5, [[0.0] * 4]), "threshold must be a number from 0 to 1"),
        (lambda: Consistency(0.5, [[0.0], [0.0, 1.0]]), "coefficients is .* for every exit"),
        (lambda: Consistency(0.5, "many"), "coefficients is 'many'"),
        (lambda: Consistency(0.5, [[math.nan] * 4]), "coefficients is"),
        (lambda: Consistency.fit(random_logits(1)), "is for classification"),
        (lambda: Consistency.fit(np.zeros((3, 4))), "must be exits, rows, classes"),
        (
            lambda: replay(Consistency(0.5, [[0.0] * 5] * EXITS), random_logits(2)),
            "6 exits and 2 classes needs .6, 4.",
        ),
        (
            lambda: check(Consistency(0.5, [[0.0] * 4] * 3), EXITS, 2),
            "shape .3, 4.; a model with 6 exits",
        ),
        (
            lambda: parse("consistency:threshold=0.9"),
            "coefficients of consistency cannot be written as FIELD=NUMBER",
        ),
    ],
)
def test_a_consistency_that_fits_no_model_is_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_consistency_is_restored_from_config_json():
    criterion = Consistency.fit(random_logits(3), threshold=0.7)
    restored = from_config(json.loads(json.dumps(to_config(criterion))))
    assert restored == criterion and hash(restored) == hash(criterion)


def test_votes_among_many_classes_need_memory_in_proportion_to_the_classes():
    """The exits predict one of three of 100 classes, so that votes for a class add up."""
    logits = random_logits(100)
    favorites = np.random.default_rng(1).choice([3, 50, 99], size=logits.shape[:2])
    np.put_along_axis(logits, favorites[..., None], 20, axis=2)
    expected_layers, expected_answers, _ = Reference(vote(2))(logits)
    exit_layers, answers = replay(Vote(2), logits)
    np.testing.assert_array_equal(exit_layers, expected_layers)
    np.testing.assert_allclose(answers, expected_answers, rtol=1e-5, atol=1e-6)
    rows = jax.ShapeDtypeStruct((7,), np.int32)
    sizes = []
    for classes in (1000, 2000):
        zeros = jax.ShapeDtypeStruct((7, classes), np.float32)
        state = jax.eval_shape(Vote(2).init, zeros, rows)
        sizes.append(sum(leaf.size for leaf in jax.tree.leaves(state)))
    assert sizes[1] <= 2 * sizes[0]


def test_a_replay_in_parts_of_the_rows_equals_a_replay_of_all_rows(monkeypatch):
    logits = random_logits(3)
    labels = np.arange(ROWS) % 3
    settings = [Entropy(0.3), Entropy(0.7), Entropy(0.9)]
    expected = replay(Oracle(labels), logits), replay_many(settings, logits)
    monkeypatch.setattr("pabee_jax.drivers.replay._VALUES_PER_CALL", 4 * 16)
    parts = replay(Oracle(labels), logits), replay_many(settings, logits)
    jax.tree.map(np.testing.assert_array_equal, parts, expected)


def test_ties_go_to_the_lowest_class():
    # At exits 1 and 2, classes 0 and 1 tie, so both exits vote for class 0.
    logits = np.array([[[2, 2, 0]], [[1, 1, 1]], [[0, 5, 0]]], np.float32)
    exit_layers, answers = replay(Vote(2), logits)
    assert exit_layers.tolist() == [2]
    np.testing.assert_allclose(answers, [[1.5, 1.5, 0.5]])
    exit_layers, _ = replay(Margin(0.0), logits)
    assert exit_layers.tolist() == [3], "the margin of two equal probabilities is 0, not above 0"


def test_the_earliest_exit_layer_of_criteria_with_a_count():
    constant = np.tile(np.float32([[9.0, 0.0]]), (EXITS, 1, 1))
    for count in (1, 2, 3):
        assert replay(PatientConfidence(count, 0.5), constant)[0].tolist() == [count]
        assert replay(Divergence(count, 0.1), constant)[0].tolist() == [count + 1]
        assert replay(Patience(count), constant)[0].tolist() == [count + 1]
        assert replay(Vote(count), constant)[0].tolist() == [count]


@pytest.mark.parametrize("criterion", [case[0] for case in CASES], ids=str)
def test_extreme_logits_give_no_nan(criterion):
    extreme = np.array([[1e4, -1e4], [-1e4, 1e4], [0, 0], [1e4, 1e4], [-1e4, -1e4]], np.float32)
    logits = np.stack([np.roll(extreme, shift, axis=0) for shift in range(EXITS)])
    exit_layers, answers = replay(criterion, logits)
    assert np.isfinite(answers).all() and ((exit_layers >= 1) & (exit_layers <= EXITS)).all()
    state = criterion.init(jnp.zeros((5, 2)), jnp.arange(5))
    for layer in range(EXITS):
        state, _ = criterion.update(state, jnp.asarray(logits[layer]), layer + 1)
        for leaf in np.atleast_1d(*[state] if not isinstance(state, tuple) else [0]):
            assert np.isfinite(leaf).all()


def test_the_oracle_exits_at_the_first_correct_exit():
    logits = random_logits(3)
    labels = np.random.default_rng(1).integers(0, 3, ROWS)
    correct = logits.argmax(axis=2) == labels
    expected_layers = np.where(correct.any(axis=0), correct.argmax(axis=0) + 1, EXITS)
    exit_layers, answers = map(np.asarray, replay(Oracle(labels), logits))
    np.testing.assert_array_equal(exit_layers, expected_layers)
    np.testing.assert_array_equal(answers.argmax(axis=1) == labels, correct.any(axis=0))


def test_the_oracle_accepts_scores_within_its_tolerance():
    logits = np.array([[[1.0]], [[1.75]], [[2.25]]], np.float32)
    assert [
        replay(Oracle(np.float32([2.0]), tolerance), logits)[0].item()
        for tolerance in (0.0, 0.2, 0.25, 1.0)
    ] == [3, 3, 2, 1]


def test_a_fixed_layer_works_for_regression():
    logits = random_logits(1)
    exit_layers, answers = replay(FixedLayer(4), logits)
    assert (np.asarray(exit_layers) == 4).all()
    np.testing.assert_array_equal(answers, logits[3])


@pytest.mark.parametrize("kind", [Entropy, MaxProbability, Margin])
@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan"), "0.5", True])
def test_thresholds_outside_their_range_are_refused(kind, threshold):
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
def test_counts_below_1_and_fractions_are_refused(make):
    with pytest.raises(InputError, match="must be a whole number, 1 or more"):
        make()


def test_check_refuses_criteria_that_need_labels_or_do_not_fit_the_task():
    with pytest.raises(InputError, match="Oracle needs the labels; use it on recorded logits"):
        check(Oracle(np.zeros(3, np.int32)), EXITS, 2)
    with pytest.raises(InputError, match="Entropy .*; the criteria for regression are .*Patience"):
        check(Entropy(0.5), EXITS, 1)
    for criterion in (Patience(3), FixedLayer(2)):
        check(criterion, EXITS, 1)


def test_every_criterion_can_be_saved_in_config_json_and_restored():
    # The test of Patience is in test_criteria.py, and Consistency has tests of its own above.
    tested = {type(criterion) for criterion, _ in CASES} | {Patience, Consistency}
    assert tested == set(CRITERIA.values()), "add the new criterion and its rule to CASES"
    for criterion, _ in CASES:
        assert from_config(to_config(criterion)) == criterion


def test_replay_many_equals_replay_of_each_setting():
    logits = random_logits(3)
    for settings in (
        [Entropy(t) for t in np.linspace(0, 1, 70)],
        [Divergence(1 + p % 4, p / 50) for p in range(5)],
        [Vote(2)],
    ):
        exit_layers, answers = replay_many(settings, logits)
        for index, setting in enumerate(settings):
            expected_layers, expected_answers = replay(setting, logits)
            np.testing.assert_array_equal(exit_layers[index], expected_layers, str(setting))
            np.testing.assert_array_equal(answers[index], expected_answers, str(setting))
    with pytest.raises(InputError, match="one or more settings of one criterion class"):
        replay_many([Entropy(0.5), Vote(2)], logits)
    with pytest.raises(InputError, match="one or more settings of one criterion class"):
        replay_many([], logits)
