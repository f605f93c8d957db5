"""An encoder with a classifier on every layer, run one layer at a time.

The methods that drivers call are `embed`, `layer` and `exit_logits`, for rows that are padded to
one length. The driver `pool`, which does not pad rows, calls the parts of these methods. The
modules hold parameters only. They are pytrees, so `jax.jit`, `jax.grad` and `jax.lax.scan` accept
them directly. The PRNG key is an argument: `key=None` means inference, and a key means training
with dropout.
"""

import contextlib
from typing import Any, Protocol, runtime_checkable

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from pabee_jax.models.activations import ACTIVATIONS
from pabee_jax.models.config import ModelConfig
from pabee_jax.models.groups import LayerGroup
from pabee_jax.models.layers import dropout
from pabee_jax.models.side_inputs import SideInputs, side_inputs
from pabee_jax.models.transformer import (
    Builder,
    Embeddings,
    Hidden,
    Mask,
)


@runtime_checkable
class Batch(Protocol):
    """The arrays of a batch by name: a dict, or a `Dataset` of tokenized rows."""

    def __getitem__(self, name: str, /) -> Any: ...

    def get(self, name: str, default: Any = None, /) -> Any: ...


def full_precision(dtype: str | np.dtype = "float32"):
    """Return a context manager that keeps float32 matrix products in float32.

    By default, TPUs and recent GPUs cast the operands to bfloat16 or TF32, which changes the exit
    layer of some rows. With another `dtype`, the context manager does nothing.
    """
    if jnp.dtype(dtype) == jnp.float32:
        return jax.default_matmul_precision("float32")
    return contextlib.nullcontext()


def attention_mask(batch: Batch) -> Mask:
    """Return the attention mask of a batch; without `attention_mask`, it covers all positions."""
    ones = jnp.ones_like(jnp.asarray(batch["input_ids"]))
    return jnp.asarray(batch.get("attention_mask", ones), bool)


def _mean_over_tokens(hidden: Hidden, mask: Mask) -> Float[Array, "batch hidden"]:
    """Return the mean over the tokens in the mask; 0 for padding rows, which have no tokens."""
    count = jnp.maximum(mask.sum(axis=1), 1)
    # 0.0, because the operator `Where` of ONNX takes two arrays of one type.
    return jnp.where(mask[:, :, None], hidden, 0.0).sum(axis=1) / count[:, None]


class ExitLinear(nnx.Module):
    """One linear layer per exit; the kernels are one array, so that an exit can be indexed."""

    def __init__(self, config: ModelConfig, features_out: int, build: Builder):
        exits, features_in = config.num_hidden_layers, config.hidden_size
        shape = (exits, features_in, features_out)
        self.kernel = nnx.Param(build.init(build.rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((exits, features_out), jnp.float32))

    def __call__(
        self, exit_index: int | Int[Array, ""], x: Float[Array, "batch features"]
    ) -> Float[Array, "batch outputs"]:
        return x @ self.kernel[...][exit_index] + self.bias[...][exit_index]


class EarlyExitModel(nnx.Module):
    """An encoder with a pooler and an internal classifier on every layer.

    Attributes:
        config: the architecture. It is static under `jit`: another `config` means a new program.
        groups: the layer parameters without repetition. For inference, a list with one `LayerGroup`
            per group. For training, one `LayerGroup` whose arrays have a leading group axis (see
            `pabee_jax.models.parameters.stacked`).
        pooler: a `Linear` that all exits share or, if `config.exit_pooler` is "per_exit", an
            `ExitLinear`.
        classifiers: an `ExitLinear` with `config.num_labels` outputs.
        position_bias: MPNet's bias of the attention scores; None for other families.
        final_norm: the LayerNorm between the layers and an exit, for a family whose layers do not
            end with a LayerNorm; None for other families.
    """

    def __init__(self, config: ModelConfig, *, dtype: str = "float32", rngs: nnx.Rngs):
        """Initialize random parameters in float32.

        Args:
            dtype: the compute dtype, "float32" or "bfloat16".
        """
        build = Builder(config, jnp.dtype(dtype), rngs)
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.embeddings = Embeddings(config, build)
        self.groups = nnx.List([LayerGroup(config, build) for _ in range(config.num_hidden_groups)])
        self.position_bias = self.final_norm = nnx.data(None)
        if config.relative_buckets:
            self.position_bias = build.embed(config.relative_buckets, config.num_attention_heads)
        size = config.hidden_size
        if config.is_pre_norm:
            self.final_norm = build.norm(size, jnp.dtype("float32"))
        if config.exit_pooler == "shared":
            self.pooler = build.linear(size, size, dtype=jnp.float32, use_bias=True)
        else:
            self.pooler = ExitLinear(config, size, build)
        self.classifiers = ExitLinear(config, config.num_labels, build)

    def embed(
        self, batch: Batch, key: Key[Array, ""] | None = None
    ) -> tuple[Hidden, Mask, SideInputs]:
        """Return the input of the first layer, the attention mask, and the layers' side inputs.

        Args:
            batch: int arrays of shape (batch, seq): `input_ids` and, optionally, `attention_mask`
                (default: 1 for all tokens) and `token_type_ids` (default: 0 for all tokens).
            key: the PRNG key for dropout; None for inference.
        """
        input_ids = jnp.asarray(batch["input_ids"])
        mask = attention_mask(batch)
        token_type_ids = jnp.asarray(batch.get("token_type_ids", jnp.zeros_like(input_ids)))
        chex.assert_rank(input_ids, 2)
        chex.assert_equal_shape([input_ids, mask, token_type_ids])
        with full_precision(self.dtype):
            positions = jnp.arange(input_ids.shape[1])
            hidden = self.embeddings(input_ids, token_type_ids, positions, key)
        return hidden, mask, self.side_inputs(len(positions))

    def side_inputs(self, length: int) -> SideInputs:
        """Return the side inputs of all layers, for rows of up to `length` tokens."""
        bias = self.position_bias
        bias = None if bias is None else bias.embedding[...].astype(jnp.float32)
        return side_inputs(self.config, bias, length)

    def layer(
        self,
        parameters: LayerGroup,
        hidden: Hidden,
        mask: Mask,
        side: SideInputs,
        key: Key[Array, ""] | None = None,
    ) -> Hidden:
        """Return the output of one encoder layer with the parameters of `parameters`.

        The caller selects the parameters and `side.of_layer`, so that the layer index is not part
        of the program.
        """
        with full_precision(self.dtype):
            return parameters(hidden, mask, side, key)

    def exit_logits(
        self,
        exit_index: int | Int[Array, ""],
        hidden: Float[Array, "batch queries hidden"],
        mask: Mask,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch classes"]:
        """Return the float32 logits of exit `exit_index` (from 0, possibly traced).

        With CLS pooling, `hidden` may have the first token only.
        """
        return self.classify(exit_index, self.exit_features(hidden, mask), key)

    def exit_features(
        self, hidden: Float[Array, "batch queries hidden"], mask: Mask
    ) -> Float[Array, "batch hidden"]:
        """Return what an exit reads, in float32: the first token, or the mean over the tokens."""
        if self.config.exit_pooling == "cls":
            hidden = hidden[:, :1]
        hidden = self.exit_hidden(hidden)
        return (
            hidden[:, 0] if self.config.exit_pooling == "cls" else _mean_over_tokens(hidden, mask)
        )

    def exit_hidden(self, hidden: Float[Array, "*tokens hidden"]) -> Float[Array, "*tokens hidden"]:
        """Return the hidden states that an exit reads, in float32."""
        hidden = hidden.astype(jnp.float32)
        return hidden if self.final_norm is None else self.final_norm(hidden)

    def classify(
        self,
        exit_index: int | Int[Array, ""],
        features: Float[Array, "batch hidden"],
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch classes"]:
        """Return the float32 logits of exit `exit_index` for the results of `exit_features`."""
        with full_precision():
            pooled = self.pooled(exit_index, features)
            pooled = dropout(pooled, self.config.exit_dropout_prob, key)
            return self.classifiers(exit_index, pooled)

    def pooled(
        self, exit_index: int | Int[Array, ""], features: Float[Array, "batch hidden"]
    ) -> Float[Array, "batch hidden"]:
        """Return the float32 pooler output of exit `exit_index`."""
        with full_precision():
            if isinstance(self.pooler, ExitLinear):
                pooled = self.pooler(exit_index, features)
            else:
                pooled = self.pooler(features)
        pooled = ACTIVATIONS[self.config.exit_act](pooled)
        if self.config.is_pre_norm:  # The scale of this LayerNorm is part of the classifiers.
            return jax.nn.standardize(pooled, epsilon=self.config.layer_norm_eps)
        return pooled

    @property
    def is_stacked(self) -> bool:
        return isinstance(self.groups, LayerGroup)
