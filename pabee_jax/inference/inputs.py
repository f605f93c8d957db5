"""Checks the inputs of `predict` on the host.

A compiled program does not fail for a token id outside the vocabulary: its logits are NaN.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from pabee_jax.data.batching import MODEL_INPUTS
from pabee_jax.data.dataset import Dataset
from pabee_jax.errors import InputError, is_unicode, shown

Text = str | tuple[str, str]
Tokens = Mapping[str, Any]


class TokenLimits(Protocol):
    """The limits of a model's inputs; `ModelConfig` and `Artifact` both have them."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def type_vocab_size(self) -> int: ...
    @property
    def max_length(self) -> int: ...


def checked_texts(inputs: Any) -> tuple[list[str], list[str | None]]:
    """Return the first text of every row, and the second text or None of every row.

    Raises:
        InputError: `inputs` is empty, an input is neither a text nor a pair of texts, or a text
            holds half a surrogate pair, which has no encoding in UTF-8. `inputs` may not be a tuple
            of two texts, because the tuple could be a pair or two inputs.
    """
    # A numpy array or a pandas Series; a DataFrame has no `tolist`.
    if hasattr(inputs, "tolist") and not isinstance(inputs, type):
        inputs = inputs.tolist()
    if isinstance(inputs, str):
        raise InputError("predict takes a list of texts, not a single text: put the text in a list")
    if not isinstance(inputs, Sequence) or isinstance(inputs, bytes | bytearray | memoryview):
        raise InputError(f"predict takes a list of texts, not a {type(inputs).__name__}")
    if isinstance(inputs, tuple) and len(inputs) == 2 and _are_texts(inputs):
        raise InputError(
            "predict got a tuple of two texts: pass [(a, b)] for a pair of texts, or [a, b] for "
            "two texts"
        )
    texts, pairs = [], []
    for index, item in enumerate(inputs):
        parts = (item, None) if isinstance(item, str) else item
        if not isinstance(parts, tuple | list) or len(parts) != 2 or not _are_texts(parts):
            raise InputError(f"input {index} is neither a text nor a pair of texts: {shown(item)}")
        if not all(is_unicode(part) for part in parts if part is not None):
            raise InputError(
                f"input {index} is no valid Unicode text, because it holds half a surrogate pair: "
                f"{shown(item)}"
            )
        texts.append(parts[0])
        pairs.append(parts[1])
    if not texts:
        raise InputError("there is nothing to predict: the list of texts is empty")
    return texts, pairs


def _are_texts(parts) -> bool:
    return isinstance(parts[0], str) and (parts[1] is None or isinstance(parts[1], str))


def checked_tokens(inputs: Tokens | Dataset, config: TokenLimits) -> Dataset:
    """Return the tokenized rows as a `Dataset`.

    Without `attention_mask` no token is masked; without `token_type_ids` all segment ids are 0.

    Raises:
        InputError: there are no rows, an array has another name, shape or type, or a value is
            outside the model's limits.
    """
    if isinstance(inputs, Dataset):
        labels, given = inputs.labels, {name: getattr(inputs, name) for name in MODEL_INPUTS}
    else:
        _check_names(inputs)
        labels, given = None, inputs
    try:
        ids = np.asarray(given["input_ids"])
        arrays = {
            "input_ids": ids,
            "attention_mask": np.asarray(given.get("attention_mask", np.ones(ids.shape, np.int8))),
            "token_type_ids": np.asarray(given.get("token_type_ids", np.zeros(ids.shape, np.int8))),
        }
    except (TypeError, ValueError):  # TypeError: a tensor of another library on another device.
        raise InputError(
            "tokenized rows must have the same length: pad them, and mask the padding"
        ) from None
    limits = {
        "input_ids": config.vocab_size,
        "attention_mask": 2,
        "token_type_ids": max(1, config.type_vocab_size),
    }
    for name, array in arrays.items():
        _check_array(name, array, ids.shape, limits[name])
    if ids.shape[1] > config.max_length:
        raise InputError(
            f"input_ids has {ids.shape[1]} columns, but the model has {config.max_length} positions"
        )
    if labels is not None and len(labels) != len(ids):
        raise InputError(f"the dataset has {len(ids)} rows, but {len(labels)} labels")
    _check_rows(arrays["attention_mask"], may_be_padding=isinstance(inputs, Dataset))
    return Dataset(
        ids.astype(np.int32, copy=False),
        arrays["attention_mask"].astype(np.int8, copy=False),
        # int8 holds the segment ids of BERT and ALBERT, which are 0 and 1.
        arrays["token_type_ids"].astype(
            np.int8 if config.type_vocab_size <= 128 else np.int32, copy=False
        ),
        labels,
    )


def _check_names(inputs: Tokens) -> None:
    if "input_ids" not in inputs:
        names = ", ".join(map(shown, list(inputs)[:10])) or "nothing"
        raise InputError(f"tokenized input needs input_ids, but it has {names}")
    for name in inputs:
        if name not in MODEL_INPUTS:
            nearest = difflib.get_close_matches(str(name), MODEL_INPUTS, n=1, cutoff=0)[0]
            raise InputError(
                f"tokenized input has the unknown key {shown(name)}, whose nearest valid key is "
                f"{nearest}; the keys are {', '.join(MODEL_INPUTS)}"
            )


def _check_array(name: str, array: np.ndarray, shape: tuple[int, ...], limit: int) -> None:
    """Raise InputError unless the array holds integers from 0 to below `limit` in this shape."""
    kinds = "iu" if name == "input_ids" else "iub"
    if array.ndim != 2 or array.dtype.kind not in kinds or array.shape != shape:
        raise InputError(
            f"{name} must be an (N, S) array of integers like input_ids, not "
            f"{array.dtype} of shape {array.shape}"
        )
    if array.size == 0:
        raise InputError(f"there is nothing to predict: {name} has shape {array.shape}")
    if array.min() < 0 or array.max() >= limit:
        raise InputError(
            f"{name} must be from 0 to {limit - 1}, but it has values from {array.min()} to "
            f"{array.max()}"
        )


def _check_rows(mask: np.ndarray, may_be_padding: bool) -> None:
    """Raise InputError if a row has no unmasked token.

    A `Dataset` of padding rows alone is valid: `warmup` compiles programs with it.
    """
    is_empty = ~mask.any(axis=1)
    if is_empty.any() and not (may_be_padding and is_empty.all()):
        raise InputError(
            f"attention_mask masks every token of row {np.argmax(is_empty)}; every row needs an "
            "unmasked token"
        )
