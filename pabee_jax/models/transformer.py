"""The embeddings and layers of a BERT-like encoder, as modules that hold parameters only.

The PRNG key is an argument: `key=None` means inference, and a key means training with dropout.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from pabee_jax.models.activations import ACTIVATIONS
from pabee_jax.models.config import ModelConfig
from pabee_jax.models.layers import Embed, LayerNorm, Linear, dropout, product
from pabee_jax.models.side_inputs import SideInputs

Hidden = Float[Array, "batch seq hidden"]
Mask = Bool[Array, "batch seq"]
Heads = Float[Array, "batch seq heads features"]
# Hidden states in any arrangement: of padded rows, or one token after the other.
Tokens = Float[Array, "*tokens hidden"]
TokenHeads = Float[Array, "*tokens heads features"]


def split_key(key: Key[Array, ""] | None, count: int):
    """Return `count` keys, or None for each if there is no key."""
    return [None] * count if key is None else jax.random.split(key, count)


class Builder:
    """A factory for submodules that share an initializer and a compute dtype."""

    def __init__(self, config: ModelConfig, dtype: np.dtype, rngs: nnx.Rngs):
        self.init = jax.nn.initializers.normal(config.initializer_range)
        self.eps, self.dtype, self.rngs = config.layer_norm_eps, dtype, rngs
        self.use_bias = config.has_biases

    def linear(
        self, features_in: int, features_out: int, dtype=None, use_bias: bool | None = None
    ) -> Linear:
        return Linear(
            features_in,
            features_out,
            use_bias=self.use_bias if use_bias is None else use_bias,
            kernel_init=self.init,
            dtype=dtype or self.dtype,
            rngs=self.rngs,
        )

    def embed(self, rows: int, features: int) -> Embed:
        return Embed(rows, features, embedding_init=self.init, dtype=self.dtype, rngs=self.rngs)

    def norm(self, features: int, dtype=None) -> LayerNorm:
        # The fast variance E[x^2] - E[x]^2 cancels too many digits for the reference's epsilon of
        # 1e-12.
        return LayerNorm(
            features,
            epsilon=self.eps,
            use_bias=self.use_bias,
            use_fast_variance=False,
            dtype=dtype or self.dtype,
            rngs=self.rngs,
        )


class Embeddings(nnx.Module):
    """Sum of word, position and token type embeddings, as far as the family has them.

    ALBERT and ELECTRA also project to `hidden_size`.
    """

    def __init__(self, config: ModelConfig, build: Builder):
        size = config.embedding_size
        self.word = build.embed(config.vocab_size, size)
        self.position = self.token_type = self.projection = nnx.data(None)
        if config.has_position_embeddings:
            self.position = build.embed(config.max_position_embeddings, size)
        if config.type_vocab_size:
            self.token_type = build.embed(config.type_vocab_size, size)
        self.norm = build.norm(size)
        if config.has_projection:
            self.projection = build.linear(size, config.hidden_size)
        self.position_offset = config.position_offset
        self.dropout_rate = config.hidden_dropout_prob

    def __call__(
        self,
        input_ids: Int[Array, "*tokens"],
        token_type_ids: Int[Array, "*tokens"],
        positions: Int[Array, "..."],
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "*tokens hidden"]:
        """Return the input of the first layer.

        `positions` are from 0 and have the shape of `input_ids`, or one value per column.
        """
        summed = self.word(input_ids)
        if self.position is not None:
            summed = summed + self.position(positions + self.position_offset)
        if self.token_type is not None:
            summed = summed + self.token_type(token_type_ids)
        embedded = dropout(self.norm(summed), self.dropout_rate, key)
        if self.projection is None:
            return embedded
        return self.projection(embedded).astype(embedded.dtype)


class TransformerLayer(nnx.Module):
    """Self-attention and a feed-forward block, both followed by dropout, residual and LayerNorm.

    `query`, `keys_values` and `finish` work on single tokens, in arrays of any leading dimensions.
    Only the attention between them needs the rows: drivers that do not pad rows bring their own.
    """

    def __init__(self, config: ModelConfig, build: Builder):
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

    def __call__(
        self, hidden: Hidden, mask: Mask, side: SideInputs, key: Key[Array, ""] | None = None
    ) -> Hidden:
        """Return the output of the layer for rows that are padded to one length."""
        attention_key, positions = split_key(key, 3)[0], jnp.arange(hidden.shape[1])
        context = attention(
            self.query(hidden, side, positions),
            *self.keys_values(hidden, side, positions),
            mask,
            side,
            self.attention_dropout_rate,
            attention_key,
        )
        return self.finish(hidden, context, key)

    def query(self, hidden: Tokens, side: SideInputs, positions: Int[Array, "..."]) -> TokenHeads:
        """Return the attention queries of tokens at these positions of their rows."""
        return side.rotated(self._heads(self.query_projection(hidden)), positions)

    def keys_values(
        self, hidden: Tokens, side: SideInputs, positions: Int[Array, "..."]
    ) -> tuple[TokenHeads, TokenHeads]:
        """Return the attention keys and values of tokens at these positions of their rows."""
        keys = side.rotated(self._heads(self.key_projection(hidden)), positions)
        return keys, self._heads(self.value_projection(hidden))

    def finish(
        self, hidden: Tokens, context: TokenHeads, key: Key[Array, ""] | None = None
    ) -> Tokens:
        """Return the output of the layer for tokens with the input `hidden`.

        Args:
            hidden: the input of the layer.
            context: the result of `attention` for these tokens.
            key: the key of the layer, for dropout; None for inference.
        """
        _, context_key, output_key = split_key(key, 3)
        context = self.attention_output(context.reshape(hidden.shape))
        hidden = self.attention_norm(hidden + dropout(context, self.dropout_rate, context_key))
        expanded = ACTIVATIONS[self.activation](self.intermediate(hidden))
        output = dropout(self.output(expanded), self.dropout_rate, output_key)
        return self.output_norm(hidden + output)

    def _heads(self, projected: Tokens) -> TokenHeads:
        heads = projected.reshape(*projected.shape[:-1], self.num_heads, -1)
        return heads.astype(self.query_projection.dtype)


def attention(
    query: Float[Array, "batch queries heads features"],
    keys: Heads,
    values: Heads,
    mask: Mask,
    side: SideInputs,
    dropout_rate: float = 0.0,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "batch queries heads features"]:
    """Return scaled dot-product attention in float32, with dropout on the probabilities.

    Not `jax.nn.dot_product_attention`, which has no dropout and returns the second product in the
    dtype of `values` (see `product`).
    """
    scores: Array = product("bqhd,bkhd->bhqk", query, keys)
    scores = scores / query.shape[-1] ** 0.5
    scores = side.on_scores(scores, mask)
    probabilities = dropout(jax.nn.softmax(scores, axis=-1), dropout_rate, key)
    return product("bhqk,bkhd->bqhd", probabilities.astype(values.dtype), values)
