"""Which exits' losses count in a step, with which weights, and what they may change."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from pabee_jax.models.config import exit_modules
from pabee_jax.training.config import TrainConfig
from pabee_jax.training.forward import GradientScales

# The parameters of all exits together, of the early exits, and of the last one.
PARTS = ("shared", "early", "last")
Parts = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Phase:
    """What one step trains: a static argument of the compiled step.

    Attributes:
        weights: of each exit's loss; they sum to 1.
        parts: of the parameters, those that change. The others stay as they are, to the bit: no
            gradient, no weight decay, and no change of their optimiser state.
        gradient: `TrainConfig.gradient`.
        gradient_scale: `TrainConfig.gradient_scale`.
    """

    weights: tuple[float, ...]
    parts: tuple[str, ...]
    gradient: str = "full"
    gradient_scale: float = 1.0


def phase_of(config: TrainConfig, step: int, total_steps: int, num_exits: int) -> Phase:
    """The phase of step number `step` (from 0): a function of nothing else, so a run can resume."""
    weights = exit_weights(config.loss.weights, num_exits)
    last_alone = exit_weights("last", num_exits)
    if config.strategy == "joint":
        return _phase(config, weights)
    if config.strategy == "alternating":  # Its paper counts steps from 1.
        return _phase(config, weights if step % 2 else last_alone)
    if not in_last_phase(config, step, total_steps):
        return _phase(config, last_alone)
    if config.strategy == "last_first":
        return _phase(config, weights)
    early = sum(weights[:-1])
    return Phase((*(weight / early for weight in weights[:-1]), 0.0), ("early",))


def in_last_phase(config: TrainConfig, step: int, total_steps: int) -> bool:
    """Whether step number `step` (from 0) belongs to the phase in which early exits are trained."""
    if config.strategy not in ("two_stage", "last_first"):
        return True
    # Both phases have a step at least.
    return step >= max(1, min(round(config.last_exit_share * total_steps), total_steps - 1))


def exit_weights(kind: str, num_exits: int) -> tuple[float, ...]:
    """Weights that sum to 1: `linear` (exit i counts i times), `uniform`, or `last`."""
    exits = range(1, num_exits + 1)
    weights = {
        "linear": list(exits),
        "uniform": [1] * num_exits,
        "last": [int(exit == num_exits) for exit in exits],
    }[kind]
    return tuple(weight / sum(weights) for weight in weights)


def _phase(config: TrainConfig, weights: tuple[float, ...]) -> Phase:
    if not any(weights[:-1]):
        return Phase(weights, ("shared", "last"))
    return Phase(weights, PARTS, config.gradient, config.gradient_scale)


def gradient_scales(phase: Phase) -> GradientScales | None:
    """What the phase multiplies the gradients with on their way into the encoder.

    "equilibrium": with L exits, layer i takes 1/(L-i+1) of its own exit's gradient and
    (L-i)/(L-i+1) of what comes from above, which makes it the mean over exits i..L ("Improved
    Techniques for Training Adaptive Deep Networks", section 3.2; ElasticBERT).
    """
    if phase.gradient == "full":
        return None
    count = len(phase.weights)
    above = jnp.arange(count - 1, -1, -1, dtype=jnp.float32)
    if phase.gradient == "equilibrium":
        return GradientScales(exit=1 / (above + 1), path=above / (above + 1))
    scale = jnp.where(above == 0, 1.0, phase.gradient_scale)
    return GradientScales(exit=scale, path=jnp.ones(count))


def split_parts(parameters: Mapping[str, Any], pooler: str) -> Parts:
    """The parameters by part; those of the exits have a leading axis over the exits.

    `pooler` is `TrainConfig.pooler`: one that all exits share is part of what they share.
    """
    owned = exit_modules(pooler)
    parts: Parts = {part: {} for part in PARTS}
    for name, value in parameters.items():
        if name.partition(".")[0] not in owned:
            parts["shared"][name] = value
            continue
        parts["last"][name] = value[-1:]
        if len(value) > 1:
            parts["early"][name] = value[:-1]
    return parts


def join_parts(parts: Parts) -> dict[str, Any]:
    """The inverse of `split_parts`."""
    early, last = parts["early"], parts["last"]
    joined = {name: jnp.concatenate([early[name], last[name]]) for name in early}
    return parts["shared"] | last | joined
