"""Tokenization of texts with Hugging Face tokenizers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from pabee_jax.data.dataset import Dataset
from pabee_jax.errors import InputError

Tokenizer = Any
VOCABULARY_FILES = ("vocab.txt", "spiece.model")


def load_tokenizer(directory: Path) -> Tokenizer:
    """Return the tokenizer of a checkpoint directory.

    Raises:
        InputError: the tokenizer's files are missing or cannot be read.
    """
    tokenizer_files = ("tokenizer.json", *VOCABULARY_FILES)
    if not any((directory / name).is_file() for name in tokenizer_files):
        raise InputError(
            f"{directory} holds no tokenizer: it needs one of {', '.join(tokenizer_files)}"
        )
    try:
        return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # The tokenizer libraries have no common base class of errors.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"the tokenizer of {directory} cannot be loaded: {reason}") from None


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


def encode(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    pairs: Sequence[str | None] | None,
    max_length: int,
) -> Dataset:
    """Return the tokenized texts, truncated to `max_length` tokens, without labels.

    Args:
        pairs: the second text of every row, or None in a row with a single text; None if all rows
            have single texts.
    """
    pairs = [None] * len(texts) if pairs is None else pairs
    is_pair = np.array([pair is not None for pair in pairs])
    parts = []
    for rows in (np.flatnonzero(~is_pair).tolist(), np.flatnonzero(is_pair).tolist()):
        if rows:
            second = [pairs[row] for row in rows] if is_pair[rows[0]] else None
            first = [texts[row] for row in rows]
            parts.append((rows, _encode_part(tokenizer, first, second, max_length)))
    width = max(part["input_ids"].shape[1] for _, part in parts)

    def joined(name: str, dtype, padding: int = 0) -> np.ndarray:
        result = np.full((len(texts), width), padding, dtype)
        for rows, part in parts:
            result[rows, : part[name].shape[1]] = part[name]
        return result

    return Dataset(
        joined("input_ids", np.int32, tokenizer.pad_token_id or 0),
        joined("attention_mask", np.int8),
        joined("token_type_ids", np.int8),
    )


def _encode_part(tokenizer: Tokenizer, texts, pairs, max_length: int):
    """Tokenize rows that are all single texts (`pairs` is None) or all pairs."""
    return tokenizer(
        texts,
        pairs,
        truncation=True,
        max_length=max_length,
        padding="longest",
        return_token_type_ids=True,  # ALBERT's tokenizer omits them by default.
        return_attention_mask=True,
        return_tensors="np",
    )
