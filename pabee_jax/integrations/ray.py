"""Ray Data: early exit on the rows of a `ray.data.Dataset`, on as many machines as the cluster has.

    import ray
    from pabee_jax.integrations.ray import Predictor

    rows = ray.data.read_parquet("gs://bucket/rows")
    predicted = rows.map_batches(
        Predictor,
        fn_constructor_kwargs={"checkpoint": "runs/mrpc", "text": "sentence1"},
        concurrency=2,
        batch_size=4096,
    )
    predicted.write_parquet("gs://bucket/predictions")

`pip install 'pabee_jax[ray]'`. Ray gives the work of an actor that dies to another actor.
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from pabee_jax.errors import InputError
from pabee_jax.inference.classifier import EarlyExitClassifier


class Predictor:
    """An actor for `ray.data.Dataset.map_batches`: it adds the columns of the predictions.

    An actor loads the checkpoint and compiles its programs once, before the first batch.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike,
        *,
        text: str = "text",
        text_pair: str = "",
        **options: Any,
    ):
        """Load the checkpoint.

        Args:
            checkpoint: a checkpoint directory, which every machine of the cluster must be able to
                read, or a Hugging Face hub id.
            text: the name of the column of the texts.
            text_pair: the name of the column of the second texts; empty for single texts.
            options: further arguments of `EarlyExitClassifier.from_pretrained`, such as
                `criterion`. The driver is "pool" if none is given, because it needs two programs
                for batches of any size.

        Raises:
            InputError: as `EarlyExitClassifier.from_pretrained`.
        """
        self._columns = {"text": text, "text_pair": text_pair}
        options.setdefault("driver", "pool")
        self._classifier = EarlyExitClassifier.from_pretrained(checkpoint, **options)
        self._classifier.warmup()

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the columns of the batch and those of `Predictions.columns`.

        Raises:
            InputError: a column is missing, a row has no text, or the batch has a column with the
                name of a column of the predictions.
        """
        columns = self._classifier.map_columns(batch, **self._columns)
        for name in columns:
            if name in batch:
                raise InputError(f"the batch has a column {name!r}, which the predictions have too")
        return {**batch, **columns}
