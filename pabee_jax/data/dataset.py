"""The in-memory dataset: tokenized rows as numpy arrays."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dataset:
    """Tokenized rows in memory, padded to the longest row.

    A `Dataset` is a pytree, and gives its arrays by name as a dict does: `early_exit` takes it as a
    batch, also as an argument of a function under `jit`.

    Attributes:
        input_ids: (N, S) int32.
        attention_mask: (N, S) int8, 1 at tokens and 0 at padding.
        token_type_ids: (N, S) int8, 1 in the second text of a pair.
        labels: (N,) int32 class ids or float32 scores; None if the labels are hidden.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    token_type_ids: np.ndarray
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, name: str, /) -> Any:
        value = self.get(name)
        if value is None:
            raise KeyError(name)
        return value

    def get(self, name: str, default: Any = None, /) -> Any:
        """Return the array of this name, as `dict.get`."""
        value = vars(self).get(name)
        return default if value is None else value

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """(N,) the last position with attention mask 1, plus one; a mask may have holes.

        The length of a row that is all padding is 0.
        """
        positions = np.arange(1, self.attention_mask.shape[1] + 1)
        return np.where(self.attention_mask != 0, positions, 0).max(axis=1, initial=0)

    def take(self, rows: np.ndarray | slice) -> "Dataset":
        """Return a dataset of the given rows."""
        labels = None if self.labels is None else self.labels[rows]
        ids, mask, segments = (values[rows] for values in self._tokens)
        return Dataset(ids, mask, segments, labels)

    def resized(self, width: int) -> "Dataset":
        """Return the same rows, padded to `width` tokens, or with less padding.

        Raises:
            ValueError: a row has more than `width` tokens.
        """
        if self.attention_mask[:, width:].any():
            raise ValueError(f"a row of {self.lengths.max()} tokens does not fit into {width}")
        padding = ((0, 0), (0, max(0, width - self.input_ids.shape[1])))
        ids, mask, segments = (np.pad(values[:, :width], padding) for values in self._tokens)
        return Dataset(ids, mask, segments, self.labels)

    def concatenated(self, other: "Dataset") -> "Dataset":
        """Return these rows followed by the rows of `other`, which must have the same width."""
        array_pairs = zip(self._tokens, other._tokens, strict=True)
        ids, mask, segments = map(np.concatenate, array_pairs)
        labels = None
        if self.labels is not None and other.labels is not None:
            labels = np.concatenate([self.labels, other.labels])
        return Dataset(ids, mask, segments, labels)

    @property
    def _tokens(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.input_ids, self.attention_mask, self.token_type_ids
