"""The parameters of one layer, which ALBERT shares between layers."""

from flax import nnx
from jaxtyping import Array, Key

from pabee_jax.models.config import ModelConfig
from pabee_jax.models.modernbert import ModernBertLayer
from pabee_jax.models.side_inputs import SideInputs
from pabee_jax.models.transformer import Builder, Hidden, Mask, TransformerLayer, split_key

# By family, where the computation differs from BERT's.
_LAYERS = {"modernbert": ModernBertLayer}


class LayerGroup(nnx.Module):
    """The parameters of one layer: `inner_group_num` transformer layers (1 except for ALBERT)."""

    def __init__(self, config: ModelConfig, build: Builder):
        layer_class = _LAYERS.get(config.family, TransformerLayer)
        self.inner = nnx.List([layer_class(config, build) for _ in range(config.inner_group_num)])

    def __call__(
        self, hidden: Hidden, mask: Mask, side: SideInputs, key: Key[Array, ""] | None = None
    ) -> Hidden:
        """Return the output of the layer; `side` is that of the layer."""
        for layer, layer_key in zip(self.inner, split_key(key, len(self.inner)), strict=True):
            hidden = layer(hidden, mask, side, layer_key)
        return hidden
