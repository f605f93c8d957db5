"""Patience-based early exit (PABEE) for BERT and ALBERT in JAX."""

import os

# transformers warns at import that without PyTorch it has no models; only tokenizers are used.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from pabee_jax.classifier import EarlyExitClassifier
from pabee_jax.criteria import (
    Divergence,
    Entropy,
    ExitCriterion,
    FixedLayer,
    Margin,
    MaxProbability,
    Oracle,
    Patience,
    PatientConfidence,
    Vote,
)
from pabee_jax.drivers.loop import early_exit
from pabee_jax.drivers.replay import replay, replay_many
from pabee_jax.errors import InputError
from pabee_jax.predictions import Predictions

__all__ = [
    "Divergence",
    "EarlyExitClassifier",
    "Entropy",
    "ExitCriterion",
    "FixedLayer",
    "InputError",
    "Margin",
    "MaxProbability",
    "Oracle",
    "Patience",
    "PatientConfidence",
    "Predictions",
    "Vote",
    "early_exit",
    "replay",
    "replay_many",
]
__version__ = "0.1.0"
