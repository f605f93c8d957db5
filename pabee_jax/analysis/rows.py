"""The rows of a split that is evaluated."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from pabee_jax.data.dataset import Dataset
from pabee_jax.data.task import Examples


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of all parts of a split, one part after the other.

    Attributes:
        dataset: tokenised.
        texts: what a person would read; a pair as one text.
        ids, kinds: see `Examples`; kinds is None when the task has none.
        parts: which rows belong to which part ("dev", or MNLI's two).
    """

    dataset: Dataset
    texts: Sequence[str]
    ids: Sequence[str]
    kinds: Sequence[str] | None
    parts: Mapping[str, slice]

    @classmethod
    def of(cls, examples: Mapping[str, Examples], tokenize: Callable[[Any], Dataset]) -> "Rows":
        """Join and tokenize the parts of a split.

        Args:
            examples: by the name of the part.
            tokenize: such as `EarlyExitClassifier.tokenize`.
        """
        values = list(examples.values())
        bounds = np.cumsum([0, *map(len, values)])
        texts = [text for part in values for text in part.texts]
        pairs = None
        if values[0].pairs is not None:
            pairs = [pair for part in values for pair in part.pairs or ()]
        known = [part.labels for part in values if part.labels is not None]
        labels = np.concatenate(known) if len(known) == len(values) else None
        dataset = tokenize(list(zip(texts, pairs, strict=True)) if pairs else texts)
        return cls(
            dataset=dataclasses.replace(dataset, labels=labels),
            texts=texts
            if pairs is None
            else [" | ".join(pair) for pair in zip(texts, pairs, strict=True)],
            ids=[id_ for part in values for id_ in part.ids],
            kinds=[kind for part in values for kind in part.kinds or ()] or None,
            parts={
                name: slice(start, stop)
                for name, start, stop in zip(examples, bounds, bounds[1:], strict=False)
            },
        )

    def take(self, chosen: Int[np.ndarray, " some"]) -> "Rows":
        """Some of the rows, by their ascending indices."""
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
