"""AdamW with linear warm-up, linear decay and clipping by global norm, as `torch.optim.AdamW`."""

import optax

from pabee_jax.training.config import TrainConfig


def learning_rate_schedule(config: TrainConfig, total_steps: int) -> optax.Schedule:
    """Return the schedule: a linear rise over the warm-up, a linear fall to 0 at `total_steps`."""
    decay = optax.linear_schedule(
        config.learning_rate, 0.0, max(total_steps - config.warmup_steps, 1)
    )
    if not config.warmup_steps:
        return decay
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


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
