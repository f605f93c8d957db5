"""Recipes for training the exits, by name, and the settings that all recipes share."""

from pathlib import Path
from typing import Any

from flax import traverse_util

from pabee_jax.training import run_directory
from pabee_jax.training.config import TrainConfig

PRIOR = {"classifier_bias": "prior"}
MEAN = PRIOR | {"pooling": "mean"}
OWN_MEAN = MEAN | {"pooler": "per_exit"}
# The exits start from random classifiers, and have fewer steps than the pretrained encoder had.
FAST_EXITS = OWN_MEAN | {"exit_learning_rate": 1e-3}
# For every recipe, the fields of the configuration that differ from PABEE's recipe.
RECIPES: dict[str, dict[str, Any]] = {
    "ordinary": {"loss.weights": "last"},
    "ordinary+mean": MEAN | {"loss.weights": "last"},
    "pabee": {},
    "prior": PRIOR,
    "uniform": PRIOR | {"loss.weights": "uniform"},
    "two_stage": PRIOR | {"strategy": "two_stage"},
    "alternating": PRIOR | {"strategy": "alternating"},
    "last_first": PRIOR | {"strategy": "last_first"},
    "equilibrium": PRIOR | {"gradient": "equilibrium"},
    "scaled": PRIOR | {"gradient": "scaled", "gradient_scale": 0.1},
    "detached": PRIOR | {"gradient": "scaled", "gradient_scale": 0.0},
    "distill": PRIOR | {"distill.weight": 1.0},
    "per_exit": PRIOR | {"pooler": "per_exit"},
    "mean": MEAN,
    "mean+per_exit": OWN_MEAN,
    "mean+per_exit+two_stage": OWN_MEAN | {"strategy": "two_stage"},
    "mean+per_exit+equilibrium": OWN_MEAN | {"gradient": "equilibrium"},
    "mean+per_exit+scaled": OWN_MEAN | {"gradient": "scaled", "gradient_scale": 0.1},
    "mean+per_exit+alternating": OWN_MEAN | {"strategy": "alternating"},
    "mean+per_exit+distill": OWN_MEAN | {"distill.weight": 1.0},
    "mean+per_exit+equilibrium+distill": OWN_MEAN
    | {"gradient": "equilibrium", "distill.weight": 1.0},
    "fast_exits": FAST_EXITS,
    "fast_exits+uniform": FAST_EXITS | {"loss.weights": "uniform"},
    "fast_exits+distill": FAST_EXITS | {"distill.weight": 1.0},
    "fast_exits+uniform+distill": FAST_EXITS | {"loss.weights": "uniform", "distill.weight": 1.0},
    "fast_exits+cosee": FAST_EXITS
    | {"sample_weights.decay": 1.0, "sample_weights.calibration": 0.1},
    "fast_exits+last_first": FAST_EXITS
    | {"strategy": "last_first", "last_exit_share": 0.33, "second_phase.learning_rate": 1e-4},
    "pabee_published": {"learning_rate": 2e-5, "warmup_steps": 0, "order": "shuffled"},
}
# The recipe of the preset glue:TASK,recommended.
RECOMMENDED = "fast_exits+uniform+distill"
# For every task, the metric that the tables show.
METRICS = {"mrpc": "accuracy", "stsb": "pearson", "sst2": "accuracy"}


def config_of(recipe: str, task: str, seed: int, data_dir: Path, options) -> TrainConfig:
    """Return the configuration of one run; `options` are those of the command."""
    shared = {
        "task": task,
        "model": options.model,
        "data_dir": str(data_dir),
        "max_seq_length": 64,
        "batch_size": 32,
        "learning_rate": options.learning_rate,
        "max_steps": options.steps,
        "eval_every": options.steps,
        "order": "length_grouped",
        "seed": seed,
        "dtype": options.dtype,
    }
    fields = traverse_util.unflatten_dict(shared | RECIPES[recipe], sep=".")
    return run_directory.from_dict(TrainConfig, fields)
