"""Floating-point operations that a model needs, whatever program runs it."""

from typing import Any

from pabee_jax.models.config import ModelConfig

# Peak of dense bfloat16 products per second and chip, by the start of `device_kind`, from the
# vendors' data sheets.
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
    """Multiplications and additions of one layer's matrix products, per token of the forward pass.

    `length` is the sequence's: attention's share grows with it.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    products = 4 * hidden * hidden + 2 * hidden * inner + 2 * length * hidden
    return 2.0 * products * config.inner_group_num


def of_training_step(config: ModelConfig, rows: int, length: int) -> float:
    """Of all layers, forward and backward (twice the forward pass), padding included.

    Embeddings and exits are less than a hundredth. What rematerialisation repeats does not count.
    """
    return 3 * per_token_and_layer(config, length) * config.num_hidden_layers * rows * length


def peak_per_second(device: Any) -> float | None:
    """The peak of a `jax.Device` in bfloat16; None where it is not known, as on a CPU."""
    kinds = (kind for kind in _PEAK if device.device_kind.startswith(kind))
    return _PEAK[kind] if (kind := next(kinds, None)) else None
