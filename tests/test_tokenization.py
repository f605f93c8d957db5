"""Tokenizers of all supported file formats: loading, encoding and saving."""

import json
import shutil

import numpy as np
import pytest
import transformers
from tokenizers.models import WordPiece
from tokenizers.processors import TemplateProcessing

from helpers import SHARED, tiny_checkpoint
from pabee_jax.data import tokenization
from pabee_jax.data.tokenization import TooManyTokens, encode, load_tokenizer, save_tokenizer
from pabee_jax.errors import InputError

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


def tokenizer_with(directory, **values):
    """Return a tokenizer of "film" (id 5) and "good" (id 6) with these settings."""
    plain = directory if directory.exists() else tiny_checkpoint(directory, ["film", "good"])
    settings = {"tokenizer_class": "BertTokenizer", **values}
    (plain / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(plain)


@pytest.mark.parametrize("values", [{}, {"padding_side": "left"}, {"pad_token": None}], ids=str)
def test_rows_are_padded_on_the_right_whatever_the_tokenizer_says(tmp_path, values):
    # Position embeddings and exits that read the first token assume it; with padding on the left,
    # the logits of a row would depend on the length of its neighbours.
    encoded = encode(tokenizer_with(tmp_path / "plain", **values), ["film", "good film"], None, 8)
    assert encoded.input_ids.tolist() == [[2, 5, 3, 0], [2, 6, 5, 3]]
    assert encoded.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_truncation_on_the_left_keeps_the_first_special_token(tmp_path):
    tokenizer = tokenizer_with(tmp_path / "plain", truncation_side="left")
    assert encode(tokenizer, ["good good film"], None, 4).input_ids.tolist() == [[2, 6, 5, 3]]


def test_a_length_without_room_for_the_texts_is_refused(tmp_path):
    tokenizer = tokenizer_with(tmp_path / "plain")
    assert encode(tokenizer, ["film film"], None, 3).input_ids.tolist() == [[2, 5, 3]]
    assert encode(tokenizer, ["film film"], ["good"], 5).input_ids.tolist() == [[2, 5, 3, 6, 3]]
    with pytest.raises(InputError, match="is 2, but it must be at least 3"):
        encode(tokenizer, ["film"], None, 2)
    with pytest.raises(InputError, match="at least 5: the tokenizer adds 3 special tokens"):
        encode(tokenizer, ["film"], ["good"], 4)


def test_a_row_without_any_token_is_refused(tmp_path):
    tokenizer = tokenizer_with(tmp_path / "plain")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(InputError, match="gives no tokens, not even special tokens, for ''"):
        encode(tokenizer, ["film", ""], None, 8)


def test_a_tokenizer_without_its_unknown_token_is_an_input_error(tmp_path):
    plain = tiny_checkpoint(tmp_path / "plain", [])
    (plain / "vocab.txt").write_text("film\n")
    tokenizer = load_tokenizer(plain)
    tokenizer.backend_tokenizer.model = WordPiece({"film": 0}, unk_token="[UNK]")
    with pytest.raises(InputError, match=r"cannot encode the texts: .*Missing \[UNK\] token"):
        encode(tokenizer, ["other"], None, 8)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("max_length", [16, 17, 512])
def test_texts_are_truncated_as_transformers_truncates_them(directory, side, max_length):
    words = [f"word{number} film" for number in range(400)]
    texts = [" ".join(words), "a short text", " ".join(words[:5])]
    pairs = [None, " ".join(words[100:]), " ".join(words[7:])]
    tokenizer = load_tokenizer(directory)
    encoded = encode(tokenizer, texts, pairs, max_length, truncation_side=side)
    assert tokenizer.truncation_side == "right"  # As before.
    reference = transformers.AutoTokenizer.from_pretrained(directory, truncation_side=side)
    for row, (text, pair) in enumerate(zip(texts, pairs, strict=True)):
        expected = reference(
            text, pair, truncation=True, max_length=max_length, return_token_type_ids=True
        )
        length = encoded.lengths[row]
        assert encoded.input_ids[row, :length].tolist() == expected["input_ids"]
        assert encoded.token_type_ids[row, :length].tolist() == expected["token_type_ids"]


@pytest.mark.parametrize("pair", [False, True])
def test_texts_that_must_not_be_truncated_may_have_just_as_many_tokens(directory, pair):
    tokenizer = load_tokenizer(directory)
    fits = "good " * (13 if pair else 14)
    pairs = ["film", "film"] if pair else None  # [CLS] text [SEP], or [CLS] text [SEP] film [SEP].
    settings = {"pairs": pairs, "max_length": 17 if pair else 16, "truncate": False}
    encoded = encode(tokenizer, [fits, "a"], **settings)
    np.testing.assert_array_equal(
        encoded.input_ids, encode(tokenizer, [fits, "a"], **settings | {"truncate": True}).input_ids
    )
    with pytest.raises(TooManyTokens, match="input 1 has more tokens than the 1[67] that are"):
        encode(tokenizer, ["a", fits + "good"], **settings)


def test_a_text_with_few_tokens_is_not_refused_for_its_characters(tmp_path):
    """WordPiece has one token for a word of more than 100 characters, and none for spaces."""
    tokenizer = tokenizer_with(tmp_path / "plain")
    texts = ["x" * 100_000, "film" + " " * 100_000 + "good", "x" * 200 + " " + "x" * 100_000]
    encoded = encode(tokenizer, texts, None, 8, truncate=False)
    assert encoded.input_ids.tolist() == [[2, 1, 3, 0], [2, 5, 6, 3], [2, 1, 1, 3]]


@pytest.mark.parametrize("pair", [False, True])
def test_a_long_text_is_refused_without_tokenizing_it(tmp_path, pair, monkeypatch):
    characters, encode_part = [], tokenization._encode_part

    def measured(tokenizer, texts, *arguments):
        characters.extend(map(len, texts))
        return encode_part(tokenizer, texts, *arguments)

    monkeypatch.setattr(tokenization, "_encode_part", measured)
    tokenizer, long = tokenizer_with(tmp_path / "plain"), "good film " * 100_000
    texts, pairs = (["film", "film"], ["film", long]) if pair else (["film", long], None)
    with pytest.raises(TooManyTokens, match="input 1 has more tokens than the 8"):
        encode(tokenizer, texts, pairs, 8, truncate=False)
    assert 0 < max(characters) < 1000
