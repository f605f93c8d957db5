"""Tokenization of texts with Hugging Face tokenizers."""

import itertools
import json
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from absl import logging

from pabee_jax.data.dataset import Dataset
from pabee_jax.errors import InputError, first_line_of, shown

Tokenizer = Any
# The vocabulary of a tokenizer, for libraries that do not read tokenizer.json.
VOCABULARY_FILES = ("vocab.txt", "spiece.model")
# A text of as many characters per allowed token is probably too long: English has about 4.
_CHARACTERS_PER_TOKEN = 32
# One of these files makes a tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json",
    *VOCABULARY_FILES,
    *("vocab.json", "sentencepiece.bpe.model"),  # RoBERTa; XLM-RoBERTa and CamemBERT.
)

# A vocabulary is cased if at least this share of its words has capital letters (of
# bert-base-cased, a third). So many of these words show whether the tokenizer keeps them.
_CASED_SHARE = 0.01
_CASED_SAMPLE = 20


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """Return the tokenizer of a checkpoint directory; None if the directory has no tokenizer.

    Raises:
        InputError: one of the tokenizer's files is missing or cannot be read, or they hold no
            words.
    """
    has = {name: (directory / name).is_file() for name in (*TOKENIZER_FILES, "merges.txt")}
    if has["vocab.json"] != has["merges.txt"] and not has["tokenizer.json"]:
        present, missing = sorted(("vocab.json", "merges.txt"), key=lambda name: not has[name])
        raise InputError(
            f"{directory} has {present}, but lacks {missing}: a byte-level tokenizer needs both "
            "files, or tokenizer.json"
        )
    if not any(has.values()):
        return None
    try:
        # Without `trust_remote_code`, transformers may ask on the terminal whether to run code.
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        words = tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)
    except Exception as error:  # The tokenizer libraries have no common base class of errors.
        reason = first_line_of(error)
        raise InputError(f"the tokenizer of {directory} cannot be loaded: {reason}") from None
    if not words:
        raise InputError(
            f"the tokenizer of {directory} has an empty vocabulary: it has only special tokens"
        )
    if _loses_capitals(tokenizer, words):
        logging.warning(
            "the vocabulary of %s has words with capital letters, but its tokenizer converts texts "
            'to lower case: if the model is cased, set "do_lower_case": false in '
            "tokenizer_config.json",
            directory,
        )
    return tokenizer


def _loses_capitals(tokenizer: Tokenizer, words: Set[str]) -> bool:
    """Return whether a cased vocabulary has a tokenizer that converts texts to lower case."""
    own = words - tokenizer.added_tokens_encoder.keys()  # Added tokens are never converted.
    cased = sorted(word for word in own if word != word.lower() and word.isalpha())
    if len(cased) < _CASED_SHARE * len(own):
        return False
    tokens = {token for word in cased[:_CASED_SAMPLE] for token in tokenizer.tokenize(word)}
    tokens -= set(tokenizer.all_special_tokens)  # Such as [UNK].
    return bool(cased) and all(token == token.lower() for token in tokens)


def check_max_length(tokenizer: Tokenizer, max_length: int, name: str, pair: bool = False) -> None:
    """Raise InputError if texts of `max_length` tokens would consist of special tokens only.

    Args:
        name: the name of the setting in the message.
        pair: whether a row is a pair of texts, each of which needs at least one token.
    """
    special_tokens = tokenizer.num_special_tokens_to_add(pair)
    least = special_tokens + (2 if pair else 1)
    if max_length < least:
        row = "a pair of texts" if pair else "a text"
        raise InputError(
            f"{name} is {max_length}, but it must be at least {least}: the tokenizer adds "
            f"{special_tokens} special tokens to {row}"
        )


def save_tokenizer(tokenizer: Tokenizer, directory: Path, max_length: int) -> None:
    """Write `tokenizer.json`, its configuration and, for older libraries, the vocabulary file.

    Args:
        tokenizer: its `model_max_length` is set to `max_length`.
        directory: an existing directory; the vocabulary file of a previous tokenizer is removed.
        max_length: longest sequence of the model, in tokens.
    """
    tokenizer.model_max_length = max_length
    source = Path(getattr(tokenizer, "vocab_file", None) or "")
    # Read before the loop below, which may delete this file if `directory` is its own folder.
    has_source = source.is_file() and source.name in VOCABULARY_FILES
    vocabulary = source.read_bytes() if has_source else None
    for name in VOCABULARY_FILES:
        (directory / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(directory)
    if any((directory / name).is_file() for name in VOCABULARY_FILES):
        return
    if vocabulary is not None:
        (directory / source.name).write_bytes(vocabulary)
        return
    model = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    if model["type"] == "WordPiece":
        token_ids = tokenizer.get_vocab()
        words = sorted(token_ids, key=token_ids.__getitem__)
        (directory / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")


class TooManyTokens(InputError):
    """Raised for a text that is too long and must not be truncated."""


def encode(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    pairs: Sequence[str | None] | None,
    max_length: int,
    *,
    truncate: bool = True,
    truncation_side: str | None = None,
) -> Dataset:
    """Return the tokenized texts, truncated to `max_length` tokens, without labels.

    Rows are padded on the right, whatever the tokenizer's `padding_side`: position embeddings and
    exits that read the first token require it.

    A fast tokenizer keeps the truncation of its last call, also for calls of other threads. Threads
    may therefore share a tokenizer only if they give the same `max_length`, `truncate` and
    `truncation_side`.

    Args:
        pairs: the second text of every row, or None in a row with a single text; None if all rows
            have single texts.
        truncate: whether rows of more than `max_length` tokens are truncated or refused.
        truncation_side: the end of the text that is cut, "left" or "right"; None for the
            tokenizer's own.

    Raises:
        TooManyTokens: a row has more than `max_length` tokens, and `truncate` is false.
        InputError: `max_length` leaves no room for a text, the tokenizer fails, or it gives no
            tokens for a row.
    """
    pairs = [None] * len(texts) if pairs is None else pairs
    if not truncate:
        for row, row_texts in enumerate(zip(texts, pairs, strict=True)):
            if any(_is_clearly_longer(tokenizer, text or "", max_length) for text in row_texts):
                raise _too_many_tokens(row, max_length)
    is_pair = np.array([pair is not None for pair in pairs])
    token_ids: list[list[int]] = [[]] * len(texts)
    token_types: list[list[int]] = [[]] * len(texts)
    limit = max_length if truncate else None
    for rows in (np.flatnonzero(~is_pair).tolist(), np.flatnonzero(is_pair).tolist()):
        if rows:
            second = [pairs[row] for row in rows] if is_pair[rows[0]] else None
            check_max_length(
                tokenizer, max_length, "the number of tokens per row", second is not None
            )
            firsts = [texts[row] for row in rows]
            part = _encode_part(tokenizer, firsts, second, limit, truncation_side)
            for row, ids, types in zip(
                rows, part["input_ids"], part["token_type_ids"], strict=True
            ):
                token_ids[row], token_types[row] = ids, types
    lengths = np.array([len(ids) for ids in token_ids])
    if not lengths.all():
        text = shown(texts[int(np.argmin(lengths))])
        raise InputError(f"the tokenizer gives no tokens, not even special tokens, for {text}")
    if lengths.max() > max_length:
        raise _too_many_tokens(int(np.argmax(lengths > max_length)), max_length)
    mask = np.arange(lengths.max()) < lengths[:, None]

    def padded(rows: list[list[int]], dtype, padding: int) -> np.ndarray:
        result = np.full(mask.shape, padding, dtype)
        result[mask] = np.fromiter(itertools.chain.from_iterable(rows), dtype)
        return result

    return Dataset(
        padded(token_ids, np.int32, tokenizer.pad_token_id or 0),
        mask.astype(np.int8),
        padded(token_types, np.int8, 0),
    )


def _is_clearly_longer(tokenizer: Tokenizer, text: str, max_length: int) -> bool:
    """Return whether the beginning of a long text has far more than `max_length` tokens.

    Tokenizing 500 kB of text takes about a second, its beginning a few milliseconds. The number of
    characters alone decides nothing: a word of any length may be one token.
    """
    beginning = text[: _CHARACTERS_PER_TOKEN * max_length]
    if len(beginning) == len(text) or len(words := beginning.rsplit(None, 1)) < 2:
        return False
    # The last word may be cut. What else the cut changes is within the factor 2.
    (ids,) = _encode_part(tokenizer, [words[0]], None, None)["input_ids"]
    return len(ids) > 2 * max_length


def _too_many_tokens(row: int, max_length: int) -> TooManyTokens:
    return TooManyTokens(
        f"input {row} has more tokens than the {max_length} that are allowed: shorten it, or have "
        "it truncated"
    )


def _encode_part(
    tokenizer: Tokenizer, texts, pairs, max_length: int | None, truncation_side: str | None = None
):
    """Tokenize rows that are all single texts (`pairs` is None) or all pairs, without padding.

    Without `max_length`, nothing is truncated.
    """
    own_side = tokenizer.truncation_side
    tokenizer.truncation_side = truncation_side or own_side
    try:
        return tokenizer(
            texts,
            pairs,
            truncation=max_length is not None,
            max_length=max_length,
            padding=False,
            return_token_type_ids=True,  # ALBERT's tokenizer omits them by default.
            return_attention_mask=False,
            verbose=False,  # No warning for texts that are not truncated.
        )
    except Exception as error:  # The tokenizers library raises `Exception` itself.
        raise InputError(f"the tokenizer cannot encode the texts: {first_line_of(error)}") from None
    finally:
        tokenizer.truncation_side = own_side
