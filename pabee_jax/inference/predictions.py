"""`Predictions`: the result of `predict`."""

import dataclasses

import numpy as np
from jaxtyping import Float, Int, Shaped


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The predictions of a call, in the order of the inputs.

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


def predictions_of(logits: Float[np.ndarray, "rows classes"]) -> Shaped[np.ndarray, " rows"]:
    """Return class ids (of equal logits, the lowest id), or scores if there is one logit."""
    logits = np.asarray(logits)
    return logits[:, 0] if logits.shape[1] == 1 else logits.argmax(axis=1)
