"""The effect of perturbed texts on one setting."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Effect:
    """What other texts do to one setting. Shares are from 0 to 1, layers count from 1.

    Attributes:
        accuracy_original: share of the rows that is right on the original texts.
        accuracy_perturbed: the same on the perturbed ones.
        misled: of the rows that were right, the share that is no more ("attack success rate").
        mean_exit_layer_original: of all rows.
        mean_exit_layer_perturbed: of all rows.
    """

    accuracy_original: float
    accuracy_perturbed: float
    misled: float
    mean_exit_layer_original: float
    mean_exit_layer_perturbed: float

    @classmethod
    def of(
        cls,
        labels: np.ndarray,
        original: np.ndarray,
        perturbed: np.ndarray,
        mean_exit_layer_original: float,
        mean_exit_layer_perturbed: float,
    ) -> "Effect":
        """From (rows,) class ids: the right ones, and those predicted from either text."""
        right, still = original == labels, perturbed == labels
        return cls(
            accuracy_original=float(right.mean()),
            accuracy_perturbed=float(still.mean()),
            misled=float((right & ~still).sum() / max(right.sum(), 1)),
            mean_exit_layer_original=float(mean_exit_layer_original),
            mean_exit_layer_perturbed=float(mean_exit_layer_perturbed),
        )
