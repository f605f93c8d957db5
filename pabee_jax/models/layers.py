"""flax layers with float32 accumulation and cheaper dropout.

With a bfloat16 compute dtype, `Linear` casts inputs and parameters to bfloat16 for the matrix
product. The parameters themselves and their gradients stay float32.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Key

# The name of dropout masks for the policies of `jax.checkpoint`. A mask takes one byte per element;
# drawing it again costs more than saving it.
DROPOUT_MASK = "dropout_mask"


def dropout(x: Array, rate: float, key: Key[Array, ""] | None) -> Array:
    """Return `x` after inverted dropout; without a key, return `x` unchanged.

    Each element takes 16 random bits, half of what `nnx.Dropout` draws. This halves the time to
    draw a mask over attention probabilities. The rate is exact to 1 / 2**17.
    """
    if key is None or rate == 0:
        return x
    *batch, features = x.shape
    words = jax.random.bits(key, (*batch, -(-features // 2)), jnp.uint32)
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16)
    mask = halves.reshape(*batch, -1)[..., :features] >= round(rate * 2**16)
    mask = checkpoint_name(mask, DROPOUT_MASK)
    return jnp.where(mask, x / (1 - rate), 0)


@jax.custom_vjp
def _affine(x: Array, kernel: Array, bias: Array) -> Array:
    """Return `x @ kernel + bias` in the dtype of `x`.

    The gradients of `kernel` and `bias` are accumulated in the dtypes of `kernel` and `bias`.
    Automatic differentiation would sum these gradients in bfloat16, over all rows and all devices.
    """
    return x @ kernel.astype(x.dtype) + bias.astype(x.dtype)


def _affine_gradients(residuals, gradient):
    x, kernel, bias = residuals
    rows, gradients = (array.reshape(-1, array.shape[-1]) for array in (x, gradient))
    kernel_gradient = jnp.matmul(rows.T, gradients, preferred_element_type=kernel.dtype)
    bias_gradient = gradients.sum(axis=0, dtype=bias.dtype)
    return gradient @ kernel.astype(x.dtype).T, kernel_gradient, bias_gradient


_affine.defvjp(
    lambda x, kernel, bias: (_affine(x, kernel, bias), (x, kernel, bias)), _affine_gradients
)


class Linear(nnx.Linear):
    """`nnx.Linear` whose parameter gradients are float32 even with a bfloat16 compute dtype."""

    def __call__(self, inputs: Array, out_sharding=None) -> Array:
        if self.dtype == jnp.float32:
            return super().__call__(inputs, out_sharding)
        return _affine(inputs.astype(self.dtype), self.kernel[...], self.bias[...])  # pyright: ignore[reportOptionalSubscript]


class Embed(nnx.Embed):
    """`nnx.Embed` that returns float32 rows.

    The table is not cast, and the sum of several embeddings is cast once, by the `LayerNorm` after
    it.
    """

    def __call__(self, inputs: Array, out_sharding=None) -> Array:
        del out_sharding
        return jnp.take(self.embedding[...], inputs, axis=0).astype(jnp.float32)


class LayerNorm(nnx.LayerNorm):
    """`nnx.LayerNorm` computed in float32; only the result is cast to `dtype`."""

    def __init__(self, *arguments, dtype: np.dtype, **options):
        super().__init__(*arguments, dtype=jnp.float32, **options)
        self.result_dtype = dtype

    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        return super().__call__(x, mask=mask).astype(self.result_dtype)
