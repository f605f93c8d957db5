"""AdamW with linear warm-up and decay, clipped by the global norm: `torch.optim.AdamW`'s steps."""

import optax

from pabee_jax.training.config import TrainConfig


def learning_rate_schedule(config: TrainConfig, total_steps: int) -> optax.Schedule:
    """Rises linearly over the warm-up, then falls linearly to 0 at `total_steps`."""
    decay = optax.linear_schedule(
        config.learning_rate, 0.0, max(total_steps - config.warmup_steps, 1)
    )
    if not config.warmup_steps:
        return decay
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def decays(name: str) -> bool:
    """Weight decay is for matrices and embeddings, not for biases and LayerNorm parameters."""
    return name.endswith(("kernel", "embedding"))


def _decay_mask(parameters: dict) -> dict[str, bool]:
    return {name: decays(name) for name in parameters}


def make_adamw(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW over parameters by name (`pabee_jax.parameters.split`), at a learning rate of 1."""
    return optax.adamw(
        1.0, eps=config.adam_epsilon, weight_decay=config.weight_decay, mask=_decay_mask
    )


def make_clipping(config: TrainConfig) -> optax.GradientTransformation:
    """Clips by the norm over all gradients of a step together."""
    if not config.max_grad_norm:
        return optax.identity()
    return optax.clip_by_global_norm(config.max_grad_norm)
