"""Training strategies: the loss weights and the trained parameters of every step."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from pabee_jax.models.config import exit_modules
from pabee_jax.training.config import TWO_PHASES, TrainConfig
from pabee_jax.training.forward import GradientScales

# The parameters that all exits share, those of the early exits, and those of the last exit.
PARTS = ("shared", "early", "last")
Parts = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Phase:
    """The loss weights and the trained parameters of a step; a static argument of the step.

    Attributes:
        weights: the weight of each exit's loss; the weights sum to 1.
        parts: the parts of the parameters that the step trains. The other parts have no gradient
            and no weight decay, and neither the parameters nor their optimizer state change.
        gradient: `TrainConfig.gradient`.
        gradient_scale: `TrainConfig.gradient_scale`.
    """

    weights: tuple[float, ...]
    parts: tuple[str, ...]
    gradient: str = "full"
    gradient_scale: float = 1.0

    @property
    def trains_early_exits(self) -> bool:
        """Whether the step trains the early exits."""
        return "early" in self.parts


def phase_of(config: TrainConfig, step: int, total_steps: int, num_exits: int) -> Phase:
    """Return the phase of step `step`, which is counted from 0.

    The phase is a function of the arguments only, so that a resumed run has the same phases.
    """
    weights = exit_weights(config.loss.weights, num_exits)
    last_exit_only = exit_weights("last", num_exits)
    if config.strategy == "joint":
        return _phase(config, weights)
    if config.strategy == "attach":
        return _early_exits_alone(weights)
    if config.strategy == "alternating":  # BERxiT counts steps from 1.
        return _phase(config, weights if step % 2 else last_exit_only)
    if not trains_early_exits(config, step, total_steps):
        return _phase(config, last_exit_only)
    if config.strategy == "last_first":
        return _phase(config, weights)
    return _early_exits_alone(weights)


def trains_early_exits(config: TrainConfig, step: int, total_steps: int) -> bool:
    """Return whether step `step`, counted from 0, is in the last phase of the strategy.

    The last phase trains the early exits. A strategy without phases is always in its last phase.
    """
    return config.strategy not in TWO_PHASES or step >= first_phase_steps(config, total_steps)


def first_phase_steps(config: TrainConfig, total_steps: int) -> int:
    """Return the number of steps in the first phase of a strategy with two phases."""
    # Both phases have at least one step.
    return max(1, min(round(config.last_exit_share * total_steps), total_steps - 1))


def exit_weights(kind: str, num_exits: int) -> tuple[float, ...]:
    """Return loss weights that sum to 1: "linear" (exit i has weight i), "uniform" or "last"."""
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


def _early_exits_alone(weights: tuple[float, ...]) -> Phase:
    """Return the phase that trains the early exits while all other parameters are frozen."""
    early_sum = sum(weights[:-1])
    return Phase((*(weight / early_sum for weight in weights[:-1]), 0.0), ("early",))


def gradient_scales(phase: Phase) -> GradientScales | None:
    """Return the factors on the gradients that enter the encoder; None if all factors are 1.

    With "equilibrium" and L exits, layer i receives 1/(L-i+1) of the gradient of exit i, and
    (L-i)/(L-i+1) of the gradient from the layers above. The sum is the mean of the gradients of
    exits i..L ("Improved Techniques for Training Adaptive Deep Networks", section 3.2;
    ElasticBERT).
    """
    if phase.gradient == "full":
        return None
    num_exits = len(phase.weights)
    layers_above = jnp.arange(num_exits - 1, -1, -1, dtype=jnp.float32)
    if phase.gradient == "equilibrium":
        return GradientScales(exit=1 / (layers_above + 1), path=layers_above / (layers_above + 1))
    scale = jnp.where(layers_above == 0, 1.0, phase.gradient_scale)
    return GradientScales(exit=scale, path=jnp.ones(num_exits))


def split_parts(parameters: Mapping[str, Any], pooler: str) -> Parts:
    """Return the parameters by part.

    Args:
        parameters: parameters by name. Parameters of exits have a leading axis over the exits.
        pooler: `TrainConfig.pooler`. A shared pooler belongs to the part "shared".
    """
    modules_per_exit = exit_modules(pooler)
    parts: Parts = {part: {} for part in PARTS}
    for name, value in parameters.items():
        if name.partition(".")[0] not in modules_per_exit:
            parts["shared"][name] = value
            continue
        parts["last"][name] = value[-1:]
        if len(value) > 1:
            parts["early"][name] = value[:-1]
    return parts


def join_parts(parts: Parts) -> dict[str, Any]:
    """Undo `split_parts`."""
    early, last = parts["early"], parts["last"]
    joined = {name: jnp.concatenate([early[name], last[name]]) for name in early}
    return parts["shared"] | last | joined
