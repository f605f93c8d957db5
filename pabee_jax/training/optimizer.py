"""AdamW with linear warm-up, linear decay and clipping by global norm, as `torch.optim.AdamW`."""

import optax

from pabee_jax.training.config import TrainConfig
from pabee_jax.training.strategy import first_phase_steps


def learning_rate_schedule(config: TrainConfig, total_steps: int) -> optax.Schedule:
    """Return the schedule: a linear rise over the warm-up, a linear fall to 0 at `total_steps`.

    With `second_phase.learning_rate`, each of the two phases has such a schedule.
    """
    if not config.second_phase.learning_rate:
        return _rise_and_fall(config.learning_rate, config.warmup_steps, total_steps)
    first_steps = first_phase_steps(config, total_steps)
    second = config.second_phase
    phases = [
        _rise_and_fall(config.learning_rate, config.warmup_steps, first_steps),
        _rise_and_fall(second.learning_rate, second.warmup_steps, total_steps - first_steps),
    ]
    return optax.join_schedules(phases, [first_steps])


def _rise_and_fall(peak: float, warmup_steps: int, steps: int) -> optax.Schedule:
    decay = optax.linear_schedule(peak, 0.0, max(steps - warmup_steps, 1))
    if not warmup_steps:
        return decay
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    return optax.join_schedules([warmup, decay], [warmup_steps])


def relative_learning_rates(config: TrainConfig) -> dict[str, float]:
    """Return the factor on the scheduled learning rate by part of the parameters (`PARTS`)."""
    of_exits = config.exit_learning_rate / config.learning_rate or 1.0
    return {"shared": 1.0, "early": of_exits, "last": of_exits}


def decays(name: str) -> bool:
    """Return whether the parameter `name` has weight decay.

    Matrices and embeddings have weight decay; biases and LayerNorm parameters have none.
    """
    return name.endswith(("kernel", "embedding"))


def _decay_mask(parameters: dict) -> dict[str, bool]:
    return {name: decays(name) for name in parameters}


def make_adamw(config: TrainConfig) -> optax.GradientTransformation:
    """Return AdamW with a learning rate of 1.

    The parameters are a dict by name (`pabee_jax.models.parameters.split`). The training step
    multiplies the updates by the scheduled learning rate.
    """
    return optax.adamw(
        1.0, eps=config.adam_epsilon, weight_decay=config.weight_decay, mask=_decay_mask
    )


def make_clipping(config: TrainConfig) -> optax.GradientTransformation:
    """Return the clipping of gradients by the norm over all gradients of a step."""
    if not config.max_grad_norm:
        return optax.identity()
    return optax.clip_by_global_norm(config.max_grad_norm)
