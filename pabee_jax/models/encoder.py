"""One encoder for BERT and ALBERT that can be run a layer at a time, with a classifier per layer.

The methods that drivers call are `embed`, `layer` (or its two parts, `start_layer` and
`finish_layer`) and `exit_logits`. Modules here only hold parameters: they are pytrees, so plain
`jax.jit`, `jax.grad` and `jax.lax.scan` take them as they are. Randomness is an argument:
`key=None` means inference, a key means training with dropout.
"""

import contextlib
from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from pabee_jax.models.activations import ACTIVATIONS
from pabee_jax.models.config import ModelConfig
from pabee_jax.models.layers import Embed, LayerNorm, Linear, dropout

Batch = Mapping[str, Array | np.ndarray]
Hidden = Float[Array, "batch seq hidden"]
Mask = Bool[Array, "batch seq"]
Heads = Float[Array, "batch seq heads features"]
KeysValues = tuple[Heads, Heads]
# Of all positions or only the first ones.
Queries = Float[Array, "batch queries hidden"]


def full_precision(dtype: str | np.dtype = "float32"):
    """A context in which float32 matrix products are float32.

    TPUs and recent GPUs otherwise round the operands to bfloat16 or TF32, which moves exits.
    """
    if jnp.dtype(dtype) == jnp.float32:
        return jax.default_matmul_precision("float32")
    return contextlib.nullcontext()


def attention_mask(batch: Batch) -> Mask:
    """Which positions of a batch may be attended to; every one where the batch does not say."""
    ones = jnp.ones_like(jnp.asarray(batch["input_ids"]))
    return jnp.asarray(batch.get("attention_mask", ones), bool)


def _split(key: Key[Array, ""] | None, count: int):
    return [None] * count if key is None else jax.random.split(key, count)


class _Builder:
    """Makes submodules with one initialiser and one compute dtype."""

    def __init__(self, config: ModelConfig, dtype: np.dtype, rngs: nnx.Rngs):
        self.init = jax.nn.initializers.normal(config.initializer_range)
        self.eps, self.dtype, self.rngs = config.layer_norm_eps, dtype, rngs

    def linear(self, features_in: int, features_out: int, dtype=None) -> Linear:
        return Linear(
            features_in,
            features_out,
            kernel_init=self.init,
            dtype=dtype or self.dtype,
            rngs=self.rngs,
        )

    def embed(self, rows: int, features: int) -> Embed:
        return Embed(rows, features, embedding_init=self.init, dtype=self.dtype, rngs=self.rngs)

    def norm(self, features: int) -> LayerNorm:
        # The fast variance E[x^2] - E[x]^2 cancels badly at the reference's epsilon of 1e-12.
        return LayerNorm(
            features,
            epsilon=self.eps,
            use_fast_variance=False,
            dtype=self.dtype,
            rngs=self.rngs,
        )


class Embeddings(nnx.Module):
    """Word, position and segment embeddings; ALBERT also maps them to the hidden size."""

    def __init__(self, config: ModelConfig, build: _Builder):
        size = config.embedding_size
        self.word = build.embed(config.vocab_size, size)
        self.position = build.embed(config.max_position_embeddings, size)
        self.token_type = build.embed(config.type_vocab_size, size)
        self.norm = build.norm(size)
        # BERT has no such mapping, ALBERT has one even where the two sizes are equal.
        albert = config.family == "albert"
        self.projection = nnx.data(build.linear(size, config.hidden_size) if albert else None)
        self.dropout_rate = config.hidden_dropout_prob

    def __call__(
        self,
        input_ids: Int[Array, "batch seq"],
        token_type_ids: Int[Array, "batch seq"],
        key: Key[Array, ""] | None = None,
    ) -> Hidden:
        positions = self.position(jnp.arange(input_ids.shape[1]))
        summed = self.word(input_ids) + positions + self.token_type(token_type_ids)
        embedded = dropout(self.norm(summed), self.dropout_rate, key)
        return embedded if self.projection is None else self.projection(embedded)


class TransformerLayer(nnx.Module):
    """Self-attention and feed-forward, each followed by dropout, residual sum and LayerNorm."""

    def __init__(self, config: ModelConfig, build: _Builder):
        hidden, inner = config.hidden_size, config.intermediate_size
        self.query_projection = build.linear(hidden, hidden)
        self.key_projection = build.linear(hidden, hidden)
        self.value_projection = build.linear(hidden, hidden)
        self.attention_output = build.linear(hidden, hidden)
        self.attention_norm = build.norm(hidden)
        self.intermediate = build.linear(hidden, inner)
        self.output = build.linear(inner, hidden)
        self.output_norm = build.norm(hidden)
        self.num_heads = config.num_attention_heads
        self.activation = config.hidden_act
        self.dropout_rate = config.hidden_dropout_prob
        self.attention_dropout_rate = config.attention_probs_dropout_prob

    def __call__(self, hidden: Hidden, mask: Mask, key: Key[Array, ""] | None = None) -> Hidden:
        return self.finish(hidden, self.keys_values(hidden), mask, key)

    def keys_values(self, hidden: Hidden) -> KeysValues:
        """What every position offers to the others' attention."""
        return self._heads(self.key_projection(hidden)), self._heads(self.value_projection(hidden))

    def finish(
        self,
        hidden: Queries,
        keys_values: KeysValues,
        mask: Mask,
        key: Key[Array, ""] | None = None,
    ) -> Queries:
        """The output at the positions of `hidden`: all of them, or only the first ones.

        `keys_values` and `mask` are those of all positions.
        """
        attention_key, first_key, second_key = _split(key, 3)
        context = self.attention_output(self._attend(hidden, keys_values, mask, attention_key))
        hidden = self.attention_norm(hidden + dropout(context, self.dropout_rate, first_key))
        expanded = ACTIVATIONS[self.activation](self.intermediate(hidden))
        expanded = dropout(self.output(expanded), self.dropout_rate, second_key)
        return self.output_norm(hidden + expanded)

    def _heads(self, projected: Queries) -> Float[Array, "batch queries heads features"]:
        return projected.reshape(*projected.shape[:2], self.num_heads, -1)

    def _attend(
        self,
        hidden: Queries,
        keys_values: KeysValues,
        mask: Mask,
        key: Key[Array, ""] | None,
    ) -> Queries:
        query, (keys, values) = self._heads(self.query_projection(hidden)), keys_values
        mask = mask[:, None, None, :]
        if key is None:
            context = jax.nn.dot_product_attention(query, keys, values, mask=mask)
        else:
            context = _attention_with_dropout(
                query, keys, values, mask, self.attention_dropout_rate, key
            )
        return context.reshape(hidden.shape)


def _attention_with_dropout(query, keys, values, mask, rate, key):
    """Attention with dropout on the probabilities, which `dot_product_attention` does not have."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores / query.shape[-1] ** 0.5, jnp.finfo(jnp.float32).min)
    probabilities = dropout(jax.nn.softmax(scores, axis=-1).astype(values.dtype), rate, key)
    return jnp.einsum("bhqk,bkhd->bqhd", probabilities, values)


def _mean_over_tokens(hidden: Hidden, mask: Mask) -> Float[Array, "batch hidden"]:
    """The mean over the tokens that may be attended to; 0 where there are none (padding rows)."""
    count = jnp.maximum(mask.sum(axis=1), 1)
    return jnp.where(mask[:, :, None], hidden, 0).sum(axis=1) / count[:, None]


class LayerGroup(nnx.Module):
    """The parameters of one "layer": `inner_group_num` transformer layers (BERT: one)."""

    def __init__(self, config: ModelConfig, build: _Builder):
        self.inner = nnx.List(
            [TransformerLayer(config, build) for _ in range(config.inner_group_num)]
        )

    def __call__(self, hidden: Hidden, mask: Mask, key: Key[Array, ""] | None = None) -> Hidden:
        for layer, layer_key in zip(self.inner, _split(key, len(self.inner)), strict=True):
            hidden = layer(hidden, mask, layer_key)
        return hidden

    def start(self, hidden: Hidden, mask: Mask) -> tuple[Hidden, KeysValues]:
        """Everything up to the last inner layer's keys and values."""
        for layer in list(self.inner)[:-1]:
            hidden = layer(hidden, mask)
        return hidden, self.inner[-1].keys_values(hidden)

    def finish(self, hidden: Queries, keys_values: KeysValues, mask: Mask) -> Queries:
        """The rest, for the positions of `hidden`; see `TransformerLayer.finish`."""
        return self.inner[-1].finish(hidden, keys_values, mask)


class ExitLinear(nnx.Module):
    """A linear map per exit, kept as one array so that an exit can be picked by index."""

    def __init__(self, config: ModelConfig, features_out: int, build: _Builder):
        exits, features_in = config.num_hidden_layers, config.hidden_size
        shape = (exits, features_in, features_out)
        self.kernel = nnx.Param(build.init(build.rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((exits, features_out), jnp.float32))

    def __call__(
        self, exit_index: int | Int[Array, ""], x: Float[Array, "batch features"]
    ) -> Float[Array, "batch outputs"]:
        return x @ self.kernel[...][exit_index] + self.bias[...][exit_index]


class EarlyExitModel(nnx.Module):
    """A BERT or ALBERT encoder with a pooler and an internal classifier on every layer.

    Attributes:
        config: the architecture (static: part of a compiled program's identity).
        groups: the distinct layer parameters. A list of `LayerGroup`s, each owning its arrays
            (inference), or one `LayerGroup` whose arrays have a leading group axis (training: see
            `pabee_jax.parameters.stacked`).
        pooler: one for all exits, or an `ExitLinear` (`config.exit_pooler`).
    """

    def __init__(self, config: ModelConfig, *, dtype: str = "float32", rngs: nnx.Rngs):
        """Random parameters in float32; `dtype` ("float32" or "bfloat16") is the compute type."""
        build = _Builder(config, jnp.dtype(dtype), rngs)
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.embeddings = Embeddings(config, build)
        self.groups = nnx.List([LayerGroup(config, build) for _ in range(config.num_hidden_groups)])
        size = config.hidden_size
        if config.exit_pooler == "shared":
            self.pooler = build.linear(size, size, dtype=jnp.float32)
        else:
            self.pooler = ExitLinear(config, size, build)
        self.classifiers = ExitLinear(config, config.num_labels, build)

    def embed(self, batch: Batch, key: Key[Array, ""] | None = None) -> tuple[Hidden, Mask]:
        """Hidden states that enter the first layer, and which positions may be attended to.

        `batch` holds `input_ids` and, optionally, `attention_mask` (absent: every token) and
        `token_type_ids` (absent: one segment), each (batch, seq) int.
        """
        input_ids = jnp.asarray(batch["input_ids"])
        mask = attention_mask(batch)
        token_type_ids = jnp.asarray(batch.get("token_type_ids", jnp.zeros_like(input_ids)))
        chex.assert_rank(input_ids, 2)
        chex.assert_equal_shape([input_ids, mask, token_type_ids])
        with full_precision(self.dtype):
            return self.embeddings(input_ids, token_type_ids, key), mask

    def layer(
        self,
        parameters: LayerGroup,
        hidden: Hidden,
        mask: Mask,
        key: Key[Array, ""] | None = None,
    ) -> Hidden:
        """One encoder layer. No index inside: the caller picks the parameters."""
        with full_precision(self.dtype):
            return parameters(hidden, mask, key)

    def start_layer(
        self, parameters: LayerGroup, hidden: Hidden, mask: Mask
    ) -> tuple[Hidden, KeysValues]:
        """The first part of a layer: what `finish_layer` needs, for inference.

        An exit that pools "cls" reads the first token only. With all tokens' keys and values,
        `finish_layer` of `hidden[:, :1]` gives it for a few percent of the layer; the rest can wait
        until it is known that the row stays.
        """
        with full_precision(self.dtype):
            return parameters.start(hidden, mask)

    def finish_layer(
        self, parameters: LayerGroup, hidden: Queries, keys_values: KeysValues, mask: Mask
    ) -> Queries:
        """The layer's output at the positions of `hidden`: all of them, or `hidden[:, :1]`."""
        with full_precision(self.dtype):
            return parameters.finish(hidden, keys_values, mask)

    def exit_logits(
        self,
        exit_index: int | Int[Array, ""],
        hidden: Queries,
        mask: Mask,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch classes"]:
        """Logits of exit `exit_index` (from 0, possibly traced), always in float32.

        `hidden` may be the first token alone where that is what an exit reads.
        """
        with full_precision():
            pooled = self.pooled(exit_index, hidden, mask)
            pooled = dropout(pooled, self.config.exit_dropout_prob, key)
            return self.classifiers(exit_index, pooled)

    def pooled(
        self, exit_index: int | Int[Array, ""], hidden: Queries, mask: Mask
    ) -> Float[Array, "batch hidden"]:
        """What the classifier of exit `exit_index` reads: from -1 to 1, in float32."""
        with full_precision():
            if self.config.exit_pooling == "cls":
                features = hidden[:, 0].astype(jnp.float32)
            else:
                features = _mean_over_tokens(hidden.astype(jnp.float32), mask)
            if isinstance(self.pooler, ExitLinear):
                return jnp.tanh(self.pooler(exit_index, features))
            return jnp.tanh(self.pooler(features))

    @property
    def is_stacked(self) -> bool:
        return isinstance(self.groups, LayerGroup)
