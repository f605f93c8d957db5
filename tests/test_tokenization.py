"""Tokenizers of all supported file formats: loading, encoding and saving."""

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
    """A directory with a published vocabulary and no tokenizer.json."""
    source, name = TOKENIZERS[request.param]
    if not (SHARED / "tokenizers" / source).is_file():
        pytest.skip("needs the published vocabularies in shared/tokenizers")
    shutil.copy(SHARED / "tokenizers" / source, tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": request.param}))
    return tmp_path


def test_pairs_have_two_segments_and_single_texts_have_one(directory):
    encoded = encode(load_tokenizer(directory), TEXTS, PAIRS, 32)
    assert encoded.input_ids.shape == encoded.attention_mask.shape == encoded.token_type_ids.shape
    # [CLS] a [SEP] b [SEP]: the second segment begins after the first separator.
    first = encoded.lengths[0] - np.count_nonzero(encoded.token_type_ids[0])
    separator = encoded.input_ids[0, first - 1]
    assert separator == encoded.input_ids[0, encoded.lengths[0] - 1]
    assert (encoded.token_type_ids[0, first : encoded.lengths[0]] == 1).all()
    assert (encoded.token_type_ids[1:] == 0).all()
    assert encoded.lengths.tolist()[1:] == [3, 2]


def test_long_texts_are_truncated(directory):
    encoded = encode(load_tokenizer(directory), ["good " * 50], ["bad " * 50], 16)
    assert encoded.input_ids.shape == (1, 16) and encoded.attention_mask.all()


def test_a_saved_tokenizer_has_the_same_vocabulary_file_and_token_ids(directory, tmp_path):
    tokenizer = load_tokenizer(directory)
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "config.json").write_bytes((directory / "config.json").read_bytes())
    save_tokenizer(tokenizer, saved, 64)
    assert (saved / "tokenizer.json").is_file()
    (name,) = {path.name for path in directory.iterdir()} & {"vocab.txt", "spiece.model"}
    assert (saved / name).read_bytes() == (directory / name).read_bytes()
    reloaded = load_tokenizer(saved)
    assert reloaded.model_max_length == 64
    for original_array, reloaded_array in zip(
        vars(encode(tokenizer, TEXTS, PAIRS, 32)).values(),
        vars(encode(reloaded, TEXTS, PAIRS, 32)).values(),
        strict=True,
    ):
        np.testing.assert_array_equal(original_array, reloaded_array)


def test_vocab_txt_is_written_for_a_tokenizer_with_only_tokenizer_json(tmp_path):
    plain = tiny_checkpoint(tmp_path / "plain", ["film", "good"])
    original = (plain / "vocab.txt").read_text()
    save_tokenizer(load_tokenizer(plain), tmp_path / "json_only", 32)
    (tmp_path / "json_only" / "vocab.txt").unlink()
    save_tokenizer(load_tokenizer(tmp_path / "json_only"), tmp_path / "saved", 32)
    assert (tmp_path / "saved" / "vocab.txt").read_text() == original


def test_saving_replaces_the_vocabulary_file_of_a_previous_tokenizer(tmp_path):
    plain = tiny_checkpoint(tmp_path / "plain", ["film", "good"])
    (tmp_path / "vocab.txt").write_text("old\n")
    save_tokenizer(load_tokenizer(plain), tmp_path, 32)
    assert (tmp_path / "vocab.txt").read_text() == (plain / "vocab.txt").read_text()
