"""Patience-based early exit (PABEE) for BERT and ALBERT in JAX."""

import os

# transformers warns at import that without PyTorch it has no models; only tokenizers are used.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from pabee_jax.classifier import EarlyExitClassifier
from pabee_jax.criteria import ExitCriterion, Patience
from pabee_jax.drivers.loop import early_exit
from pabee_jax.drivers.replay import replay
from pabee_jax.errors import InputError
from pabee_jax.predictions import Predictions

__all__ = [
    "EarlyExitClassifier",
    "ExitCriterion",
    "InputError",
    "Patience",
    "Predictions",
    "early_exit",
    "replay",
]
__version__ = "0.1.0"
