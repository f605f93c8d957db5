"""Checks the inputs of `predict` on the host.

A compiled program does not fail for a token id outside the vocabulary: it clamps the id.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from pabee_jax.data.dataset import Dataset
from pabee_jax.errors import InputError

Text = str | tuple[str, str]
Tokens = Mapping[str, Any]


class TokenLimits(Protocol):
    """The limits of a model's inputs; `ModelConfig` and `Artifact` both have them."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def type_vocab_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...


def checked_texts(inputs: Any) -> tuple[list[str], list[str | None]]:
    """Return the first text of every row, and the second text or None of every row.

    Raises:
        InputError: `inputs` is empty, or an input is neither a text nor a pair of texts.
    """
    if hasattr(inputs, "tolist"):  # A numpy array or a pandas Series; a DataFrame has no `tolist`.
        inputs = inputs.tolist()
    if isinstance(inputs, str):
        raise InputError("predict takes a list of texts, not a single text: put the text in a list")
    if not isinstance(inputs, Sequence):
        raise InputError(f"predict takes a list of texts, not a {type(inputs).__name__}")
    texts, pairs = [], []
    for index, item in enumerate(inputs):
        parts = (item, None) if isinstance(item, str) else item
        if not isinstance(parts, tuple | list) or len(parts) != 2 or not _are_texts(parts):
            raise InputError(f"input {index} is neither a text nor a pair of texts: {item!r}")
        texts.append(parts[0])
        pairs.append(parts[1])
    if not texts:
        raise InputError("there is nothing to predict: the list of texts is empty")
    return texts, pairs


def _are_texts(parts) -> bool:
    return isinstance(parts[0], str) and (parts[1] is None or isinstance(parts[1], str))


def checked_tokens(inputs: Tokens, config: TokenLimits) -> Dataset:
    """Return the tokenized rows as a `Dataset`.

    Without `attention_mask` no token is masked; without `token_type_ids` all segment ids are 0.

    Raises:
        InputError: there are no rows, an array has another shape or type, or a value is outside the
            model's limits.
    """
    if "input_ids" not in inputs:
        raise InputError(
            f"tokenized input needs input_ids, but it has {', '.join(inputs) or 'nothing'}"
        )
    try:
        ids = np.asarray(inputs["input_ids"])
        arrays = {
            "input_ids": ids,
            "attention_mask": np.asarray(inputs.get("attention_mask", np.ones_like(ids))),
            "token_type_ids": np.asarray(inputs.get("token_type_ids", np.zeros_like(ids))),
        }
    except ValueError:
        raise InputError(
            "tokenized rows must have the same length: pad them, and mask the padding"
        ) from None
    limits = {
        "input_ids": config.vocab_size,
        "attention_mask": 2,
        "token_type_ids": config.type_vocab_size,
    }
    for name, array in arrays.items():
        if array.ndim != 2 or array.dtype.kind not in "iub" or array.shape != ids.shape:
            raise InputError(
                f"{name} must be an (N, S) array of integers like input_ids, not "
                f"{array.dtype} of shape {array.shape}"
            )
        if array.size == 0:
            raise InputError(f"there is nothing to predict: {name} has shape {array.shape}")
        if array.min() < 0 or array.max() >= limits[name]:
            raise InputError(
                f"{name} must be from 0 to {limits[name] - 1}, but it has values from "
                f"{array.min()} to {array.max()}"
            )
    if ids.shape[1] > config.max_position_embeddings:
        raise InputError(
            f"input_ids has {ids.shape[1]} columns, but the model has "
            f"{config.max_position_embeddings} positions"
        )
    empty_rows = np.flatnonzero(~arrays["attention_mask"].any(axis=1))
    if len(empty_rows):
        raise InputError(
            f"attention_mask masks every token of row {empty_rows[0]}; every row needs an "
            "unmasked token"
        )
    return Dataset(
        arrays["input_ids"].astype(np.int32),
        arrays["attention_mask"].astype(np.int8),
        arrays["token_type_ids"].astype(np.int8),
    )
