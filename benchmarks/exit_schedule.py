"""A criterion under which every row exits at a given layer."""

import dataclasses

import numpy as np
from jaxtyping import Array, Int

from pabee_jax.criteria import Criterion, registered


@registered()
@dataclasses.dataclass(frozen=True)
class ExitSchedule(Criterion):
    """Row b of the call exits at `exit_layers[b]`; its logits have no effect.

    Attributes:
        exit_layers: (rows,) int32, from 1.
    """

    for_regression = True

    exit_layers: Int[Array | np.ndarray, " rows"]

    def init(self, logits, row):
        del logits
        return self.exit_layers[row]

    def update(self, state, logits, layer):
        del logits
        return state, layer >= state


def binomial_exit_layers(rows: int, mean: float, num_layers: int, seed: int = 0) -> np.ndarray:
    """Return (rows,) int32 exit layers from 1 to `num_layers`.

    An exit layer minus 1 is binomial; the expected exit layer is `mean`.
    """
    probability = (mean - 1) / max(1, num_layers - 1)
    random = np.random.default_rng(seed)
    return (1 + random.binomial(num_layers - 1, probability, rows)).astype(np.int32)
