"""Criteria under which every row exits at a given layer.

As for every other criterion, whether a row exits depends on its logits (here: they are numbers), so
that XLA cannot run a layer before the exits that precede it.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pabee_jax import FixedLayer
from pabee_jax.criteria import Criterion, registered


@registered()
@dataclasses.dataclass(frozen=True)
class ExitSchedule(Criterion):
    """Row b of the call exits at `exit_layers[b]`.

    Attributes:
        exit_layers: (rows,) int32, from 1.
    """

    for_regression = True

    exit_layers: Int[Array | np.ndarray, " rows"]

    def init(self, logits, row):
        del logits
        return self.exit_layers[row]

    def update(self, state, logits, layer):
        return state, (layer >= state) & _are_numbers(logits)


@registered()
@dataclasses.dataclass(frozen=True)
class ScheduledExit(FixedLayer):
    """All rows exit at `layer`."""

    def update(self, state, logits, layer):
        state, exits = super().update(state, logits, layer)
        return state, exits & _are_numbers(logits)


def _are_numbers(logits):
    return ~jnp.any(jnp.isnan(logits), axis=-1)


def binomial_exit_layers(rows: int, mean: float, num_layers: int, seed: int = 0) -> np.ndarray:
    """Return (rows,) int32 exit layers from 1 to `num_layers`.

    An exit layer minus 1 is binomial; the expected exit layer is `mean`.
    """
    probability = (mean - 1) / max(1, num_layers - 1)
    random = np.random.default_rng(seed)
    return (1 + random.binomial(num_layers - 1, probability, rows)).astype(np.int32)
