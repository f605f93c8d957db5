"""Tokenized rows of an evaluated split, with their texts, ids and parts."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from pabee_jax.data.dataset import Dataset
from pabee_jax.data.task import Examples


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of all parts of a split, concatenated in the order of the parts.

    Attributes:
        dataset: the tokenized rows, with their labels if every part has labels.
        texts: the text of each row for display; the two texts of a pair are joined with " | ".
        ids: the id of each row, see `Examples`.
        kinds: the kind of each row, see `Examples`; None if the task has no kinds.
        parts: the rows of each part by the part's name, such as "dev" or "dev_matched".
    """

    dataset: Dataset
    texts: Sequence[str]
    ids: Sequence[str]
    kinds: Sequence[str] | None
    parts: Mapping[str, slice]

    @classmethod
    def of(cls, examples: Mapping[str, Examples], tokenize: Callable[[Any], Dataset]) -> "Rows":
        """Concatenate and tokenize the parts of a split.

        Args:
            examples: the examples of each part by the part's name.
            tokenize: tokenizes a list of texts or of pairs, as `EarlyExitClassifier.tokenize` does.
        """
        parts = list(examples.values())
        bounds = np.cumsum([0, *map(len, parts)])
        texts = [text for part in parts for text in part.texts]
        pairs = None
        if parts[0].pairs is not None:
            pairs = [pair for part in parts for pair in part.pairs or ()]
        part_labels = [part.labels for part in parts if part.labels is not None]
        labels = np.concatenate(part_labels) if len(part_labels) == len(parts) else None
        dataset = tokenize(list(zip(texts, pairs, strict=True)) if pairs else texts)
        return cls(
            dataset=dataclasses.replace(dataset, labels=labels),
            texts=texts
            if pairs is None
            else [" | ".join(pair) for pair in zip(texts, pairs, strict=True)],
            ids=[row_id for part in parts for row_id in part.ids],
            kinds=[kind for part in parts for kind in part.kinds or ()] or None,
            parts={
                name: slice(start, stop)
                for name, start, stop in zip(examples, bounds, bounds[1:], strict=False)
            },
        )

    def take(self, chosen: Int[np.ndarray, " selected"]) -> "Rows":
        """Return the rows at the indices `chosen`, which must be ascending."""
        indices: list[int] = chosen.tolist()
        return Rows(
            dataset=self.dataset.take(chosen),
            texts=[self.texts[index] for index in indices],
            ids=[self.ids[index] for index in indices],
            kinds=None if self.kinds is None else [self.kinds[index] for index in indices],
            parts={
                name: slice(*np.searchsorted(chosen, (where.start, where.stop)).tolist())
                for name, where in self.parts.items()
            },
        )
