"""What a prediction is."""

import dataclasses

import numpy as np
from jaxtyping import Float, Int, Shaped


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Answers in the order of the inputs.

    Attributes:
        labels: (N,) int class ids, or float32 scores for regression.
        logits: (N, C) float32, of the exit at which each row left.
        exit_layers: (N,) int, from 1.
        label_names: class names by class id; empty for regression.
    """

    labels: Shaped[np.ndarray, " rows"]
    logits: Float[np.ndarray, "rows classes"]
    exit_layers: Int[np.ndarray, " rows"]
    label_names: tuple[str, ...]


def predictions_of(logits: Float[np.ndarray, "rows classes"]) -> Shaped[np.ndarray, " rows"]:
    """Class ids (ties go to the lowest), or scores for one class."""
    logits = np.asarray(logits)
    return logits[:, 0] if logits.shape[1] == 1 else logits.argmax(axis=1)
