"""A layer of ModernBERT (arXiv 2412.13663): what it computes otherwise than a layer of BERT.

LayerNorm comes before attention and before the feed-forward block instead of after them, the
feed-forward block is gated (GeGLU), and linear maps and LayerNorm have no biases. Rotation of
queries and keys and local attention are side inputs.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from pabee_jax.models.activations import ACTIVATIONS
from pabee_jax.models.config import ModelConfig
from pabee_jax.models.layers import dropout
from pabee_jax.models.side_inputs import SideInputs
from pabee_jax.models.transformer import Builder, TokenHeads, Tokens, TransformerLayer, split_key


class ModernBertLayer(TransformerLayer):
    """Pre-norm self-attention and a gated feed-forward block.

    `attention_norm` is before the attention, and `output_norm` before the feed-forward block. The
    first layer has no `attention_norm`: the embeddings end with a LayerNorm. (It has parameters for
    it, so that all layers have the same parameters.)
    """

    def __init__(self, config: ModelConfig, build: Builder):
        super().__init__(config, build)
        self.gate = build.linear(config.hidden_size, config.intermediate_size)

    def query(self, hidden: Tokens, side: SideInputs, positions: Int[Array, "..."]) -> TokenHeads:
        return super().query(self._normalized(hidden, side), side, positions)

    def keys_values(
        self, hidden: Tokens, side: SideInputs, positions: Int[Array, "..."]
    ) -> tuple[TokenHeads, TokenHeads]:
        return super().keys_values(self._normalized(hidden, side), side, positions)

    def finish(
        self, hidden: Tokens, context: TokenHeads, key: Key[Array, ""] | None = None
    ) -> Tokens:
        _, context_key, output_key = split_key(key, 3)
        context = self.attention_output(context.reshape(hidden.shape))
        attended = hidden + dropout(context, self.attention_dropout_rate, context_key)
        normalized = self.output_norm(attended)
        expanded = ACTIVATIONS[self.activation](self.intermediate(normalized))
        expanded = dropout(expanded * self.gate(normalized), self.dropout_rate, output_key)
        return (attended + self.output(expanded)).astype(hidden.dtype)

    def _normalized(self, hidden: Tokens, side: SideInputs) -> Tokens:
        assert side.is_first is not None
        return jnp.where(side.is_first, hidden, self.attention_norm(hidden))
