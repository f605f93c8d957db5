"""Floating-point operations of a model, independent of the program that runs it."""

from typing import Any

from pabee_jax.models.config import ModelConfig

# Peak dense bfloat16 FLOP/s per chip by the prefix of `device_kind`, from the vendors' data sheets.
_PEAK = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def per_token_and_layer(config: ModelConfig, length: int) -> float:
    """Return the FLOPs per token of one layer's matrix products in the forward pass.

    A multiplication and an addition count as two operations. `length` is the sequence length in
    tokens; the FLOPs of attention per token are proportional to it.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    feed_forward = (3 if config.is_gated else 2) * hidden * inner
    products = 4 * hidden * hidden + feed_forward + 2 * length * hidden
    return 2.0 * products * config.inner_group_num


def of_training_step(config: ModelConfig, rows: int, length: int) -> float:
    """Return the FLOPs of all layers in one training step, padding included.

    The backward pass counts as two forward passes. Embeddings and exits, less than 1% of the total,
    are left out. Operations that rematerialization repeats do not count.
    """
    return 3 * per_token_and_layer(config, length) * config.num_hidden_layers * rows * length


def peak_per_second(device: Any) -> float | None:
    """Return the peak bfloat16 FLOP/s of a `jax.Device`, or None if it is unknown (a CPU)."""
    prefixes = (prefix for prefix in _PEAK if device.device_kind.startswith(prefix))
    return _PEAK[prefix] if (prefix := next(prefixes, None)) else None
