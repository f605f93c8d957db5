"""`EarlyExitClassifier`: the inputs and settings that it takes and refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from helpers import random_batch, tiny_model
from pabee_jax import EarlyExitClassifier, InputError, Patience
from pabee_jax.data.dataset import Dataset
from pabee_jax.inference.inputs import checked_tokens


def test_an_absent_mask_means_all_ones_and_absent_segments_mean_zeros(classifier):
    tokens = random_batch(5, length=9)
    tokens = {name: np.minimum(array, 5) for name, array in tokens.items()}
    assert classifier.predict(tokens).logits.shape == (5, 3)
    ids_only = classifier.predict({"input_ids": tokens["input_ids"].tolist()})
    ones = np.ones_like(tokens["input_ids"])
    explicit = classifier.predict(
        {"input_ids": tokens["input_ids"], "attention_mask": ones, "token_type_ids": 0 * ones}
    )
    np.testing.assert_array_equal(ids_only.logits, explicit.logits)


def test_tokens_masked_in_the_middle_of_a_row_do_not_change_the_logits(classifier):
    ids = np.array([[2, 4, 5, 5, 4, 3]])
    other_ids = np.array([[2, 4, 4, 4, 4, 3]])
    mask = np.array([[1, 1, 0, 0, 1, 1]])
    predictions = classifier.predict({"input_ids": ids, "attention_mask": mask})
    other_predictions = classifier.predict({"input_ids": other_ids, "attention_mask": mask})
    np.testing.assert_allclose(predictions.logits, other_predictions.logits, atol=1e-6)


def dataset(ids, mask=None, labels=None):
    ids = np.asarray(ids)
    mask = np.ones(ids.shape, np.int8) if mask is None else np.asarray(mask)
    return Dataset(ids, mask, np.zeros(ids.shape, np.int8), labels)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "the list of texts is empty"),
        ("one text", "put the text in a list"),
        (("a", "b"), r"pass \[\(a, b\)\] for a pair of texts, or \[a, b\] for two texts"),
        (b"text", "takes a list of texts, not a bytes"),
        (["a", "\ud800"], "input 1 is no valid Unicode text"),
        ([("a", "\udfff")], "input 0 is no valid Unicode text"),
        ([None], "input 0 is neither a text nor a pair"),
        ([b"a"], "input 0 is neither a text nor a pair"),
        ([Path("a")], "input 0 is neither a text nor a pair"),
        ([[["a"]]], "input 0 is neither a text nor a pair"),
        ([1], "input 0 is neither a text nor a pair"),
        ([("a", "b", "c")], "input 0 is neither a text nor a pair"),
        ({}, "needs input_ids"),
        ({"input_ids": [[10_000]]}, "input_ids must be from 0 to"),
        ({"input_ids": [[-1]]}, "input_ids must be from 0 to"),
        ({"input_ids": [[1]], "token_type_ids": [[2]]}, "token_type_ids must be from 0 to 1"),
        ({"input_ids": [[1]], "attention_masks": [[1]]}, "'attention_masks', .* attention_mask;"),
        ({"input_ids": [[1]], "attention_mask": [[2]]}, "attention_mask must be from 0 to 1"),
        ({"input_ids": [[1]], "attention_mask": None}, "attention_mask must be an .N, S. array"),
        ({"input_ids": [[True]]}, "array of integers"),
        ({"input_ids": np.ones((1, 2), object)}, "array of integers"),
        ({"input_ids": [[10**30]]}, "array of integers"),
        ({"input_ids": np.zeros((4, 0), int)}, "nothing to predict"),
        (dataset([[10_000]]), "input_ids must be from 0 to"),
        (dataset([[-1]]), "input_ids must be from 0 to"),
        (dataset([[1.0]]), "array of integers"),
        (dataset(np.ones((2, 33), int)), "33 columns, but the model has 32 positions"),
        (dataset([[1, 1]], mask=[[1]]), "must be an .N, S. array"),
        (dataset([[1], [1]], mask=[[1], [0]]), "masks every token of row 1"),
        (dataset([[1], [1]], labels=[0]), "the dataset has 2 rows, but 1 labels"),
        ({"input_ids": [[1]], "attention_mask": [[0]]}, "masks every token of row 0"),
        ({"input_ids": [[1]], "attention_mask": [[1, 1]]}, "must be an .N, S. array"),
        ({"input_ids": [[1, 2], [3]]}, "must have the same length"),
        ({"input_ids": [1]}, "must be an .N, S. array"),
        ({"input_ids": [[0.5]]}, "array of integers"),
        ({"input_ids": np.zeros((0, 4), int)}, "nothing to predict"),
        ({"input_ids": np.zeros((1, 33), int)}, "33 columns, but the model has 32 positions"),
        ((text for text in ["a"]), "takes a list of texts, not a generator"),
        (None, "takes a list of texts, not a NoneType"),
        (3, "takes a list of texts, not a int"),
    ],
)
def test_wrong_inputs_are_input_errors(classifier, inputs, message):
    with pytest.raises(InputError, match=message):
        classifier.predict(inputs)


def test_a_row_does_not_depend_on_its_neighbours_if_the_tokenizer_pads_on_the_left(
    directory, tmp_path
):
    shutil.copytree(directory, tmp_path / "left")
    settings = {"tokenizer_class": "BertTokenizer", "padding_side": "left"}
    (tmp_path / "left" / "tokenizer_config.json").write_text(json.dumps(settings))
    left = EarlyExitClassifier.from_pretrained(str(tmp_path / "left"), num_labels=2, driver="loop")
    right = EarlyExitClassifier.from_pretrained(str(directory), num_labels=2, driver="loop")
    texts = ["good", "a good film " * 3]
    np.testing.assert_array_equal(left.predict(texts).logits, right.predict(texts).logits)


def test_segment_ids_above_127_are_kept():
    limits = tiny_model(type_vocab_size=300).config
    tokens = {"input_ids": [[1, 2]], "token_type_ids": [[0, 299]]}
    assert checked_tokens(tokens, limits).token_type_ids.tolist() == [[0, 299]]


def test_an_array_of_texts_is_a_list_of_texts(classifier):
    texts = ["good", "a bad film"]
    expected = classifier.predict(texts)
    np.testing.assert_array_equal(classifier.predict(np.array(texts)).logits, expected.logits)


def test_wrong_settings_are_input_errors(directory):
    load = EarlyExitClassifier.from_pretrained
    with pytest.raises(
        InputError, match="no internal classifiers yet, and no .* head: give num_labels="
    ):
        load(str(directory))
    for criterion in (3, "patience", Patience):
        with pytest.raises(InputError, match="it must be an exit criterion, such as Patience"):
            load(str(directory), num_labels=2, criterion=criterion)
    with pytest.raises(InputError, match="unknown driver 'fast'; known are auto, full, loop, pool"):
        load(str(directory), num_labels=2, driver="fast")
    with pytest.raises(InputError, match="dtype is 'float8'"):
        load(str(directory), num_labels=2, dtype="float8")
    with pytest.raises(InputError, match="num_labels is 0; it must be a whole number from 1"):
        load(str(directory), num_labels=0)
    with pytest.raises(InputError, match="batch_size must be at least 1"):
        load(str(directory), num_labels=2).predict(["a"], batch_size=0)
    with pytest.raises(InputError, match="batch_size must be a whole number, not '8'"):
        load(str(directory), num_labels=2).predict(["a"], batch_size="8")
    with pytest.raises(InputError, match="chunk_tokens must be at least 1, not 0"):
        load(str(directory), num_labels=2, chunk_tokens=0)


ODD_ARGUMENTS = {
    "mesh": [3, "x"],
    "num_labels": ["2", 2.0, 0, -1, True, 10**12],
    "seed": ["x", 1.5, None],
    "chunk_tokens": ["x", 0, 1.5],
    "compilation_cache": [3, "", b"x"],
    "revision": [3, ""],
    "dtype": [None, "int8", np.float32, 3],
    "driver": [None, 3],
    "criterion": [Patience, 3, "patience"],
}


@pytest.mark.parametrize("name", ODD_ARGUMENTS)
def test_an_odd_argument_is_refused_by_its_name(name, directory):
    for value in ODD_ARGUMENTS[name]:
        words = "path" if name == "compilation_cache" else name
        with pytest.raises(InputError, match=words):
            EarlyExitClassifier.from_pretrained(directory, **{"num_labels": 2, name: value})


@pytest.mark.parametrize(
    "path", [None, 3, b"x", "", ["a"], Path, Path("absent"), Path("/no/where")]
)
def test_what_is_no_checkpoint_is_an_input_error(path):
    with pytest.raises(InputError, match="path|there is no directory"):
        EarlyExitClassifier.from_pretrained(path, num_labels=2)


def test_odd_arguments_of_methods_are_input_errors(classifier, directory):
    for lengths in (["x"], [1.5], "8", 5, [0]):
        with pytest.raises(InputError, match="lengths"):
            classifier.warmup(1, lengths=lengths)
    for target in (None, 3, directory / "config.json"):
        with pytest.raises(InputError, match="path|is a file"):
            classifier.save_pretrained(target)
