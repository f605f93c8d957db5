"""Text -> arrays of token ids, through Hugging Face tokenizers."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from pabee_jax.errors import InputError

Tokenizer = Any
VOCABULARY_FILES = ("vocab.txt", "spiece.model")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Tokenised rows in memory, padded to the longest of them.

    Attributes:
        input_ids: (N, S) int32.
        attention_mask: (N, S) int8, 1 where there is a token.
        token_type_ids: (N, S) int8, 1 in the second text of a pair.
        labels: (N,) int32 class ids or float32 scores; None when they are hidden.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    token_type_ids: np.ndarray
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """(N,) one more than the last position that may be attended to; a mask may have holes."""
        width = self.attention_mask.shape[1]
        return width - np.argmax(self.attention_mask[:, ::-1] != 0, axis=1)

    def take(self, rows: np.ndarray | slice) -> "Dataset":
        """Only these rows."""
        labels = None if self.labels is None else self.labels[rows]
        return Dataset(*(values[rows] for values in self._tokens), labels)

    def fitted(self, width: int) -> "Dataset":
        """Cut or padded to `width` tokens."""
        missing = ((0, 0), (0, max(0, width - self.input_ids.shape[1])))
        return Dataset(*(np.pad(each[:, :width], missing) for each in self._tokens), self.labels)

    def joined(self, other: "Dataset") -> "Dataset":
        """These rows and, after them, those of another dataset of the same width."""
        pairs = zip(self._tokens, other._tokens, strict=True)
        labels = None
        if self.labels is not None and other.labels is not None:
            labels = np.concatenate([self.labels, other.labels])
        return Dataset(*map(np.concatenate, pairs), labels)

    @property
    def _tokens(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.input_ids, self.attention_mask, self.token_type_ids


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory.

    Raises:
        InputError: its files are missing or cannot be read.
    """
    known = ("tokenizer.json", *VOCABULARY_FILES)
    if not any((directory / name).is_file() for name in known):
        raise InputError(f"{directory} holds no tokenizer: none of {', '.join(known)} is there")
    try:
        return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # The tokenizer libraries have no common exception.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"the tokenizer of {directory} cannot be loaded: {reason}") from None


def save_tokenizer(tokenizer: Tokenizer, directory: Path, max_length: int) -> None:
    """Writes `tokenizer.json`, its configuration, and the plain vocabulary older libraries read."""
    tokenizer.model_max_length = max_length
    source = Path(getattr(tokenizer, "vocab_file", None) or "")
    kept = source.read_bytes() if source.is_file() and source.name in VOCABULARY_FILES else None
    for name in VOCABULARY_FILES:  # Another tokenizer's, if the directory had one.
        (directory / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(directory)
    if any((directory / name).is_file() for name in VOCABULARY_FILES):
        return
    if kept is not None:
        (directory / source.name).write_bytes(kept)
        return
    kind = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["model"]["type"]
    if kind == "WordPiece":
        vocabulary = tokenizer.get_vocab()
        words = sorted(vocabulary, key=vocabulary.__getitem__)
        (directory / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")


def encode(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    pairs: Sequence[str | None] | None,
    max_length: int,
) -> Dataset:
    """Token ids of texts; rows whose entry in `pairs` is not None are sentence pairs."""
    pairs = [None] * len(texts) if pairs is None else pairs
    is_pair = np.array([pair is not None for pair in pairs])
    parts = []
    for rows in (np.flatnonzero(~is_pair), np.flatnonzero(is_pair)):
        if len(rows):
            second = [pairs[row] for row in rows] if is_pair[rows[0]] else None
            first = [texts[row] for row in rows]
            parts.append((rows, _encode_alike(tokenizer, first, second, max_length)))
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


def _encode_alike(tokenizer: Tokenizer, texts, pairs, max_length: int):
    return tokenizer(
        texts,
        pairs,
        truncation=True,
        max_length=max_length,
        padding="longest",
        return_token_type_ids=True,  # ALBERT's tokenizer leaves them out unless asked.
        return_attention_mask=True,
        return_tensors="np",
    )
