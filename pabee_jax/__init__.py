"""Patience-based early exit (PABEE) for BERT-like encoders in JAX."""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pabee_jax import criteria as criteria
    from pabee_jax.criteria import (
        Consistency,
        Divergence,
        Energy,
        Ensemble,
        Entropy,
        ExitCriterion,
        FixedLayer,
        Margin,
        MaxProbability,
        Oracle,
        Patience,
        PatientConfidence,
        Vote,
        Window,
    )
    from pabee_jax.drivers.loop import early_exit
    from pabee_jax.drivers.replay import replay, replay_many
    from pabee_jax.errors import InputError
    from pabee_jax.inference.classifier import EarlyExitClassifier
    from pabee_jax.inference.predictions import Predictions

__version__ = "0.1.0"

__all__ = [
    "Consistency",
    "Divergence",
    "EarlyExitClassifier",
    "Energy",
    "Ensemble",
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
    "Window",
    "early_exit",
    "replay",
    "replay_many",
]

# transformers warns at import that without PyTorch it has no models; only tokenizers are used.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# The modules that are imported when a name is first used; every other name is a criterion.
_MODULES = {
    "EarlyExitClassifier": "pabee_jax.inference.classifier",
    "InputError": "pabee_jax.errors",
    "Predictions": "pabee_jax.inference.predictions",
    "early_exit": "pabee_jax.drivers.loop",
    "replay": "pabee_jax.drivers.replay",
    "replay_many": "pabee_jax.drivers.replay",
}


def __getattr__(name: str) -> Any:
    if name == "criteria":
        return importlib.import_module("pabee_jax.criteria")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_MODULES.get(name, "pabee_jax.criteria"))
    return globals().setdefault(name, getattr(module, name))


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
