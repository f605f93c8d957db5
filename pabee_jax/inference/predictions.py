"""`Predictions`: the result of `predict`."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from jaxtyping import Float, Int, Shaped
from scipy.special import softmax

from pabee_jax.errors import InputError

if TYPE_CHECKING:
    import pandas


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The prediction of one row.

    Attributes:
        label: the name of the predicted class; for regression, the score.
        probability: the probability of the predicted class; None for regression.
        exit_layer: the layer (from 1) at which the row exited.
    """

    label: str | float
    probability: float | None
    exit_layer: int


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
    """The predictions of a call, in the order of the inputs.

    `len` is the number of rows. `predictions[3]` and iteration give a `Prediction` per row; a slice
    or an array of indices gives `Predictions`.

    Attributes:
        labels: (N,) int class ids, or float32 scores for regression.
        logits: (N, C) float32, the logits of each row's exit.
        exit_layers: (N,) int, the layer (from 1) at which each row exited.
        label_names: class names by class id; empty for regression.
    """

    labels: Shaped[np.ndarray, " rows"]
    logits: Float[np.ndarray, "rows classes"]
    exit_layers: Int[np.ndarray, " rows"]
    label_names: tuple[str, ...]

    @property
    def is_regression(self) -> bool:
        return self.logits.shape[1] == 1

    @functools.cached_property
    def probabilities(self) -> Float[np.ndarray, "rows classes"]:
        """The softmax of the logits, (N, C) float32.

        Raises:
            InputError: the model is a regression.
        """
        if self.is_regression:
            raise InputError("a regression has no probabilities; its scores are in labels")
        return softmax(self.logits, axis=1)

    @property
    def label_strings(self) -> list[str]:
        """The name of each row's predicted class.

        Raises:
            InputError: the model is a regression.
        """
        if self.is_regression:
            raise InputError("a regression has no classes; its scores are in labels")
        return [self.label_names[label] for label in self.labels]

    def to_pandas(self) -> "pandas.DataFrame":
        """Return a data frame with a line per row.

        The columns are `label` (the name of the class), `probability` (of that class) and
        `exit_layer`; for regression, `score` and `exit_layer`.

        Raises:
            InputError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise InputError("to_pandas needs pandas: pip install pandas") from None
        columns: dict[str, Any] = {"score": self.labels}
        if not self.is_regression:
            columns = {"label": self.label_strings, "probability": self.probabilities.max(axis=1)}
        return pandas.DataFrame(columns | {"exit_layer": self.exit_layers})

    def columns(self) -> dict[str, np.ndarray]:
        """Return the predictions as columns: what `pabee-jax predict` writes.

        The columns are `label` (the name of the class), `score_NAME` (the probability of each
        class) and `exit_layer`; for regression, `value` and `exit_layer`. See `column_names`.
        """
        if self.is_regression:
            values = [self.labels]
        else:
            values = [np.asarray(self.label_strings), *self.probabilities.T]
        names = column_names(self.label_names)
        return dict(zip(names, [*values, self.exit_layers], strict=True))

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[Prediction]:
        return (self[row] for row in range(len(self)))

    @overload
    def __getitem__(self, rows: int) -> Prediction: ...

    @overload
    def __getitem__(self, rows: slice | np.ndarray | list) -> "Predictions": ...

    def __getitem__(self, rows):
        if not isinstance(rows, int | np.integer):
            return Predictions(
                self.labels[rows], self.logits[rows], self.exit_layers[rows], self.label_names
            )
        exit_layer = int(self.exit_layers[rows])
        if self.is_regression:
            return Prediction(float(self.labels[rows]), None, exit_layer)
        label = self.labels[rows]
        return Prediction(
            self.label_names[label], float(self.probabilities[rows, label]), exit_layer
        )

    def __repr__(self) -> str:
        return f"Predictions({len(self)} rows, mean exit layer {self.exit_layers.mean():.2f})"


def column_names(label_names: Sequence[str]) -> list[str]:
    """Return the names of the columns of `Predictions.columns`; no label names for regression."""
    if not label_names:
        return ["value", "exit_layer"]
    return ["label", *(f"score_{name}" for name in label_names), "exit_layer"]


def predictions_of(logits: Float[np.ndarray, "rows classes"]) -> Shaped[np.ndarray, " rows"]:
    """Return class ids (of equal logits, the lowest id), or scores if there is one logit."""
    logits = np.asarray(logits)
    return logits[:, 0] if logits.shape[1] == 1 else logits.argmax(axis=1)
