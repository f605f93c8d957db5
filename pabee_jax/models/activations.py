"""Hidden activation functions by their Hugging Face names."""

from functools import partial

import jax
import jax.numpy as jnp

_gelu_exact = partial(jax.nn.gelu, approximate=False)
_gelu_tanh = partial(jax.nn.gelu, approximate=True)

# jax.nn.gelu defaults to the tanh approximation: that is ALBERT's `gelu_new`, not BERT's `gelu`.
ACTIVATIONS = {
    "gelu": _gelu_exact,
    "gelu_python": _gelu_exact,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "leaky_relu": jax.nn.leaky_relu,
    "linear": lambda x: x,
    "mish": jax.nn.mish,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
