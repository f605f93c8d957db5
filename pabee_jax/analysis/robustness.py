"""Robustness of one setting: its results on original and on perturbed texts."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Effect:
    """The effect of perturbed texts on one setting.

    Shares are from 0 to 1; layers count from 1.

    Attributes:
        accuracy_original: accuracy on the original texts.
        accuracy_perturbed: accuracy on the perturbed texts.
        misled: the share of the rows with a correct prediction on the original text whose
            prediction on the perturbed text is wrong ("attack success rate").
        mean_exit_layer_original: mean exit layer of all rows on the original texts.
        mean_exit_layer_perturbed: mean exit layer of all rows on the perturbed texts.
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
        """Return the effect of perturbed texts on the predictions.

        Args:
            labels: (rows,) class ids.
            original: (rows,) class ids predicted from the original texts.
            perturbed: (rows,) class ids predicted from the perturbed texts.
            mean_exit_layer_original: mean exit layer on the original texts.
            mean_exit_layer_perturbed: mean exit layer on the perturbed texts.
        """
        correct_original, correct_perturbed = original == labels, perturbed == labels
        misled = correct_original & ~correct_perturbed
        return cls(
            accuracy_original=float(correct_original.mean()),
            accuracy_perturbed=float(correct_perturbed.mean()),
            misled=float(misled.sum() / max(correct_original.sum(), 1)),
            mean_exit_layer_original=float(mean_exit_layer_original),
            mean_exit_layer_perturbed=float(mean_exit_layer_perturbed),
        )
