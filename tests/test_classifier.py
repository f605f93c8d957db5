"""The user's class: texts in, predictions with exit layers out."""

import numpy as np
import pytest
from helpers import random_batch, tiny_checkpoint

from pabee_jax import EarlyExitClassifier, InputError, Patience, replay
from pabee_jax.drivers.programs import run_early_exit

TEXTS = ["a film", ("a film", "was good"), "", "the film was not good at all " * 9, "good", "bad"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A plain encoder: no classifiers yet."""
    words = ["a", "film", "was", "good", "the", "not", "at", "all", "bad"]
    # Wide enough that exits disagree.
    shape = {"num_hidden_layers": 5, "initializer_range": 0.5}
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "plain", words, **shape)


@pytest.fixture(scope="module")
def classifier(directory):
    return EarlyExitClassifier.from_pretrained(
        str(directory), criterion=Patience(1), driver="loop", num_labels=3
    )


def test_drivers_agree_in_input_order(classifier, directory):
    full = EarlyExitClassifier.from_pretrained(
        str(directory), criterion=Patience(1), driver="full", num_labels=3
    )
    one, other = classifier.predict(TEXTS), full.predict(TEXTS)
    np.testing.assert_array_equal(one.exit_layers, other.exit_layers)
    np.testing.assert_allclose(one.logits, other.logits, atol=2e-5)
    np.testing.assert_array_equal(one.labels, one.logits.argmax(axis=1))
    assert one.label_names == ("LABEL_0", "LABEL_1", "LABEL_2")
    alone = [classifier.predict([text]) for text in TEXTS]
    np.testing.assert_array_equal(one.exit_layers, [found.exit_layers[0] for found in alone])


def test_all_exit_logits_answer_every_patience(classifier):
    logits = classifier.all_exit_logits(TEXTS)
    assert logits.shape == (classifier.num_layers, len(TEXTS), 3)
    for patience in (0, 1, 2):
        classifier.criterion = Patience(patience)
        exits, answers = replay(Patience(patience), logits)
        found = classifier.predict(TEXTS)
        np.testing.assert_array_equal(found.exit_layers, exits)
        np.testing.assert_allclose(found.logits, answers, atol=2e-5)
    classifier.criterion = Patience(1)


def test_warmup_compiles_every_shape_that_predict_uses(classifier):
    classifier.warmup(batch_size=4)
    compiled = run_early_exit._cache_size()
    random = np.random.default_rng(0)
    for patience in (0, 1, 2):
        classifier.criterion = Patience(patience)
        for rows in (1, 2, 3, 5, 9):
            texts = [" ".join(["film"] * random.integers(1, 60)) for _ in range(rows)]
            classifier.predict(texts, batch_size=4)
    classifier.criterion = Patience(1)
    assert run_early_exit._cache_size() == compiled


def test_takes_tokens_with_and_without_mask(classifier):
    tokens = random_batch(5, length=9)
    tokens = {name: np.minimum(value, 5) for name, value in tokens.items()}
    whole = classifier.predict(tokens)
    assert whole.logits.shape == (5, 3)
    bare = classifier.predict({"input_ids": tokens["input_ids"].tolist()})
    ones = np.ones_like(tokens["input_ids"])
    told = classifier.predict(
        {"input_ids": tokens["input_ids"], "attention_mask": ones, "token_type_ids": 0 * ones}
    )
    np.testing.assert_array_equal(bare.logits, told.logits)


def test_a_mask_may_have_holes(classifier):
    ids = np.array([[2, 4, 5, 5, 4, 3]])
    hole = np.array([[1, 1, 0, 0, 1, 1]])
    with_hole = classifier.predict({"input_ids": ids, "attention_mask": hole})
    other_ids = np.array([[2, 4, 4, 4, 4, 3]])
    same = classifier.predict({"input_ids": other_ids, "attention_mask": hole})
    np.testing.assert_allclose(with_hole.logits, same.logits, atol=1e-6)


def test_survives_saving_with_its_criterion(classifier, tmp_path):
    classifier.save_pretrained(tmp_path / "saved")
    again = EarlyExitClassifier.from_pretrained(str(tmp_path / "saved"))
    assert again.criterion == Patience(1)
    np.testing.assert_array_equal(again.all_exit_logits(TEXTS), classifier.all_exit_logits(TEXTS))


def test_regression_gives_scores(directory):
    scorer = EarlyExitClassifier.from_pretrained(str(directory), num_labels=1)
    found = scorer.predict(TEXTS)
    assert found.labels.dtype == np.float32 and found.label_names == ()
    np.testing.assert_array_equal(found.labels, found.logits[:, 0])
    assert (found.exit_layers == scorer.num_layers).all()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "the list of texts is empty"),
        ("one text", "put it in a list"),
        ([1], "input 0 is neither a text nor a pair"),
        ([("a", "b", "c")], "input 0 is neither a text nor a pair"),
        ({}, "needs input_ids"),
        ({"input_ids": [[10_000]]}, "input_ids must be from 0 to"),
        ({"input_ids": [[-1]]}, "input_ids must be from 0 to"),
        ({"input_ids": [[1]], "token_type_ids": [[2]]}, "token_type_ids must be from 0 to 1"),
        ({"input_ids": [[1]], "attention_mask": [[0]]}, "masks every token of row 0"),
        ({"input_ids": [[1]], "attention_mask": [[1, 1]]}, "must be an .N, S. array"),
        ({"input_ids": [[1, 2], [3]]}, "must have one length"),
        ({"input_ids": [1]}, "must be an .N, S. array"),
        ({"input_ids": [[0.5]]}, "array of integers"),
        ({"input_ids": np.zeros((0, 4), int)}, "nothing to predict"),
        ({"input_ids": np.zeros((1, 33), int)}, "33 columns, but the model has 32 positions"),
    ],
)
def test_refuses_inputs_in_one_sentence(classifier, inputs, message):
    with pytest.raises(InputError, match=message):
        classifier.predict(inputs)


def test_refuses_bad_settings(directory):
    load = EarlyExitClassifier.from_pretrained
    with pytest.raises(InputError, match="no internal classifiers yet: give num_labels="):
        load(str(directory))
    with pytest.raises(InputError, match="unknown driver 'fast'; known are auto, full, loop, pool"):
        load(str(directory), num_labels=2, driver="fast")
    with pytest.raises(InputError, match="dtype is 'float8'"):
        load(str(directory), num_labels=2, dtype="float8")
    with pytest.raises(InputError, match="num_labels must be at least 1"):
        load(str(directory), num_labels=0)
    with pytest.raises(InputError, match="batch_size must be at least 1"):
        load(str(directory), num_labels=2).predict(["a"], batch_size=0)
