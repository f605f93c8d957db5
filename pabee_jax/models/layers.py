"""Matrix products and flax layers with float32 accumulation, and cheaper dropout.

With a bfloat16 compute dtype, the operands of every matrix product are cast to bfloat16, and its
result is float32: biases, activations, residual sums and LayerNorm are float32. What a layer stores
or hands to the next layer is cast to bfloat16. The parameters and their gradients stay float32; for
inference, `in_compute_dtype` casts the matrices once, which changes no result.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(equation: str, x: Array, y: Array) -> Float[Array, "..."]:
    """Return `jnp.einsum(equation, x, y)`, accumulated and returned in float32.

    The gradients of `x` and `y` are products of operands in the dtypes of `x` and `y`, too.
    Automatic differentiation would multiply by a float32 gradient. In float32, this is `einsum`.

    Args:
        equation: such as "bqd,bkd->bqk". Each operand has one index that the other operand does not
            have, and every index of an operand is also an index of the other or of the result.
        x, y: both of one dtype, such as bfloat16. XLA's CPU backend multiplies bfloat16 operands
            at twice the speed of float32 if, and only if, it may return float32.
    """
    of_x, of_y, of_result = re.split(",|->", equation)
    batch = "".join(index for index in of_result if index in of_x and index in of_y)
    if len(batch) < 2:
        return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)
    # With several batch dimensions, XLA's CPU backend (jaxlib 0.10) has no product of bfloat16 that
    # returns float32 for some layouts: it raises UNIMPLEMENTED. With one batch dimension, it has.
    (free_x,), (free_y,) = set(of_x) - set(of_y), set(of_y) - set(of_x)
    (summed,) = set(of_x) - set(of_result)
    x = jnp.einsum(f"{of_x}->{batch}{free_x}{summed}", x)
    y = jnp.einsum(f"{of_y}->{batch}{summed}{free_y}", y)
    sizes = x.shape[: len(batch)]
    x, y = (operand.reshape(-1, *operand.shape[len(batch) :]) for operand in (x, y))
    result = jnp.matmul(x, y, preferred_element_type=jnp.float32).reshape(*sizes, *x.shape[1:2], -1)
    return jnp.einsum(f"{batch}{free_x}{free_y}->{of_result}", result)


def _product_gradients(equation, operands, gradient):
    x, y = operands
    of_x, of_y, of_result = re.split(",|->", equation)
    gradient = gradient.astype(x.dtype)
    x_gradient: Array = product(f"{of_result},{of_y}->{of_x}", gradient, y)
    y_gradient: Array = product(f"{of_result},{of_x}->{of_y}", gradient, x)
    return x_gradient.astype(x.dtype), y_gradient.astype(y.dtype)


product.defvjp(lambda equation, x, y: (product(equation, x, y), (x, y)), _product_gradients)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _affine(dtype: np.dtype, x: Array, kernel: Array, bias: Array) -> Float[Array, "..."]:
    """Return `x @ kernel + bias` in float32; the product is a product of operands of type `dtype`.

    The gradients have the dtypes of `x`, `kernel` and `bias`. Automatic differentiation would sum
    the gradients of `kernel` and `bias` in `dtype`, over all rows and all devices.
    """
    rows = x.reshape(-1, x.shape[-1]).astype(dtype)
    output: Array = product("ri,io->ro", rows, kernel.astype(dtype))
    return (output + bias).reshape(*x.shape[:-1], -1)


def _affine_gradients(dtype, residuals, gradient):
    x, kernel, bias = residuals
    rows = x.reshape(-1, x.shape[-1])
    gradients = gradient.reshape(-1, gradient.shape[-1])
    cast_gradients = gradients.astype(dtype)
    x_gradient: Array = product("ro,io->ri", cast_gradients, kernel.astype(dtype))
    kernel_gradient: Array = product("ir,ro->io", _transposed(rows.astype(dtype)), cast_gradients)
    return (
        x_gradient.reshape(x.shape).astype(x.dtype),
        kernel_gradient.astype(kernel.dtype),
        gradients.sum(axis=0, dtype=jnp.float32).astype(bias.dtype),
    )


def _transposed(x: Float[Array, "rows features"]) -> Float[Array, "features rows"]:
    """Return the transpose; on a CPU, as a copy of its own.

    XLA's CPU backend folds a transpose into the product that reads it, and then multiplies bfloat16
    in float32.
    """
    return jax.lax.platform_dependent(
        x, cpu=lambda x: jax.lax.optimization_barrier(x.T), default=lambda x: x.T
    )


_affine.defvjp(
    lambda dtype, x, kernel, bias: (_affine(dtype, x, kernel, bias), (x, kernel, bias)),
    _affine_gradients,
)


class Linear(nnx.Linear):
    """`nnx.Linear` that multiplies in `dtype`, and accumulates and returns float32."""

    def __call__(self, inputs: Array, out_sharding=None) -> Float[Array, "..."]:
        if self.dtype == jnp.float32:
            return super().__call__(inputs)
        kernel = self.kernel[...]
        bias = jnp.zeros(kernel.shape[-1:], kernel.dtype) if self.bias is None else self.bias[...]
        return _affine(self.dtype, inputs, kernel, bias)


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
        del mask
        return super().__call__(x).astype(self.result_dtype)
