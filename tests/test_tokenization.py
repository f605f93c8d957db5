"""Tokenizers in the formats people have, and what a run keeps of them."""

import json
import shutil

import numpy as np
import pytest

from helpers import SHARED, tiny_checkpoint
from pabee_jax.data.tokenization import encode, load_tokenizer, save_tokenizer

TEXTS = ["The film wasn't bad!", "good", ""]
PAIRS = ["It was good.", None, None]
TOKENIZERS = {
    "bert": ("bert-base-uncased.vocab.txt", "vocab.txt"),
    "albert": ("albert-base-v2.spiece.model", "spiece.model"),
}


@pytest.fixture(params=TOKENIZERS)
def directory(request, tmp_path):
    """A directory with the real vocabulary only: no tokenizer.json."""
    source, name = TOKENIZERS[request.param]
    if not (SHARED / "tokenizers" / source).is_file():
        pytest.skip("the real vocabularies are not here")
    shutil.copy(SHARED / "tokenizers" / source, tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": request.param}))
    return tmp_path


def test_pairs_keep_their_segments_and_single_texts_have_one(directory):
    found = encode(load_tokenizer(directory), TEXTS, PAIRS, 32)
    assert found.input_ids.shape == found.attention_mask.shape == found.token_type_ids.shape
    # [CLS] a [SEP] b [SEP]: everything after the first separator is the second segment.
    first = found.lengths[0] - np.count_nonzero(found.token_type_ids[0])
    separator = found.input_ids[0, first - 1]
    assert separator == found.input_ids[0, found.lengths[0] - 1]
    assert (found.token_type_ids[0, first : found.lengths[0]] == 1).all()
    assert (found.token_type_ids[1:] == 0).all()
    assert found.lengths.tolist()[1:] == [3, 2]


def test_long_texts_are_cut(directory):
    found = encode(load_tokenizer(directory), ["good " * 50], ["bad " * 50], 16)
    assert found.input_ids.shape == (1, 16) and found.attention_mask.all()


def test_a_saved_tokenizer_keeps_its_vocabulary_file_and_its_ids(directory, tmp_path):
    tokenizer = load_tokenizer(directory)
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "config.json").write_bytes((directory / "config.json").read_bytes())
    save_tokenizer(tokenizer, saved, 64)
    assert (saved / "tokenizer.json").is_file()
    (name,) = {path.name for path in directory.iterdir()} & {"vocab.txt", "spiece.model"}
    assert (saved / name).read_bytes() == (directory / name).read_bytes()
    again = load_tokenizer(saved)
    assert again.model_max_length == 64
    for one, other in zip(
        vars(encode(tokenizer, TEXTS, PAIRS, 32)).values(),
        vars(encode(again, TEXTS, PAIRS, 32)).values(),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_vocab_txt_is_written_for_a_tokenizer_that_came_as_json_only(tmp_path):
    plain = tiny_checkpoint(tmp_path / "plain", ["film", "good"])
    original = (plain / "vocab.txt").read_text()
    save_tokenizer(load_tokenizer(plain), tmp_path / "one", 32)
    (tmp_path / "one" / "vocab.txt").unlink()
    save_tokenizer(load_tokenizer(tmp_path / "one"), tmp_path / "two", 32)
    assert (tmp_path / "two" / "vocab.txt").read_text() == original


def test_another_tokenizers_vocabulary_does_not_stay(tmp_path):
    plain = tiny_checkpoint(tmp_path / "plain", ["film", "good"])
    (tmp_path / "vocab.txt").write_text("old\n")
    save_tokenizer(load_tokenizer(plain), tmp_path, 32)
    assert (tmp_path / "vocab.txt").read_text() == (plain / "vocab.txt").read_text()
