"""What a layer is made of: flax's own parts, where they round or draw too much.

With bfloat16 these round what is computed with; parameters and their gradients stay float32.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Key

# What `jax.checkpoint` may call a mask: a byte per element, dearer to draw than to keep.
DROPOUT_MASK = "dropout_mask"


def dropout(x: Array, rate: float, key: Key[Array, ""] | None) -> Array:
    """Inverted dropout; the identity without a key.

    Each element takes 16 random bits, half of what `nnx.Dropout` draws, which is half of the time
    of a mask over attention probabilities. The rate is exact to 1 / 2**17.
    """
    if key is None or rate == 0:
        return x
    *batch, features = x.shape
    words = jax.random.bits(key, (*batch, -(-features // 2)), jnp.uint32)
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16)
    kept = halves.reshape(*batch, -1)[..., :features] >= round(rate * 2**16)
    kept = checkpoint_name(kept, DROPOUT_MASK)
    return jnp.where(kept, x / (1 - rate), 0)


@jax.custom_vjp
def _affine(x: Array, kernel: Array, bias: Array) -> Array:
    """`x @ kernel + bias` in x's type, with gradients of kernel and bias in their own.

    Automatic differentiation would sum these over all rows, and over all devices, in bfloat16.
    """
    return x @ kernel.astype(x.dtype) + bias.astype(x.dtype)


def _affine_gradients(saved, gradient):
    x, kernel, bias = saved
    rows, gradients = (one.reshape(-1, one.shape[-1]) for one in (x, gradient))
    of_kernel = jnp.matmul(rows.T, gradients, preferred_element_type=kernel.dtype)
    of_bias = gradients.sum(axis=0, dtype=bias.dtype)
    return gradient @ kernel.astype(x.dtype).T, of_kernel, of_bias


_affine.defvjp(
    lambda x, kernel, bias: (_affine(x, kernel, bias), (x, kernel, bias)), _affine_gradients
)


class Linear(nnx.Linear):
    """`nnx.Linear`, whose parameters' gradients are float32 also when it computes in bfloat16."""

    def __call__(self, inputs: Array, out_sharding=None) -> Array:
        if self.dtype == jnp.float32:
            return super().__call__(inputs, out_sharding)
        return _affine(inputs.astype(self.dtype), self.kernel[...], self.bias[...])  # pyright: ignore[reportOptionalSubscript]


class Embed(nnx.Embed):
    """`nnx.Embed`, whose rows are float32: their sum is rounded once, and the table never."""

    def __call__(self, inputs: Array, out_sharding=None) -> Array:
        del out_sharding
        return jnp.take(self.embedding[...], inputs, axis=0).astype(jnp.float32)


class LayerNorm(nnx.LayerNorm):
    """`nnx.LayerNorm` in float32, which rounds only its result."""

    def __init__(self, *arguments, dtype: np.dtype, **options):
        super().__init__(*arguments, dtype=jnp.float32, **options)
        self.result_dtype = dtype

    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        return super().__call__(x, mask=mask).astype(self.result_dtype)
