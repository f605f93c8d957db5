"""AdamW with linear warm-up, linear decay and clipping by global norm, as `torch.optim.AdamW`."""

import optax

from pabee_jax.training.config import TrainConfig
from pabee_jax.training.strategy import first_phase_steps


def learning_rate_schedules(config: TrainConfig, total_steps: int) -> dict[str, optax.Schedule]:
    """Return the learning rate by step, for every part of the parameters (`PARTS`).

    A schedule rises linearly over the warm-up and falls linearly to 0 at `total_steps`. With
    `second_phase.learning_rate`, each of the two phases has such a schedule.
    """
    of_exits = _schedule(config, total_steps, config.exit_learning_rate)
    return {"shared": _schedule(config, total_steps), "early": of_exits, "last": of_exits}


def _schedule(
    config: TrainConfig, total_steps: int, exit_learning_rate: float = 0.0
) -> optax.Schedule:
    """Return the schedule of the encoder or, with `exit_learning_rate`, of the exits."""
    peak, second = exit_learning_rate or config.learning_rate, config.second_phase
    if not second.learning_rate:
        return _rise_and_fall(peak, config.warmup_steps, total_steps)
    # The second phase of "two_stage" trains the exits alone, so that its rate is that of the exits.
    second_peak = second.learning_rate
    if exit_learning_rate and config.strategy == "last_first":
        second_peak = exit_learning_rate
    first_steps = first_phase_steps(config, total_steps)
    phases = [
        _rise_and_fall(peak, config.warmup_steps, first_steps),
        _rise_and_fall(second_peak, second.warmup_steps, total_steps - first_steps),
    ]
    return optax.join_schedules(phases, [first_steps])


def _rise_and_fall(peak: float, warmup_steps: int, steps: int) -> optax.Schedule:
    decay = optax.linear_schedule(peak, 0.0, max(steps - warmup_steps, 1))
    if not warmup_steps:
        return decay
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    return optax.join_schedules([warmup, decay], [warmup_steps])


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
