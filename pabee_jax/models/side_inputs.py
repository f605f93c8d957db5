"""What the layers of some families read beside parameters, hidden states and mask.

BERT and most of its relatives read nothing else. MPNet adds a bias to the attention scores that
depends on the positions of query and key. ModernBERT rotates queries and keys by their positions,
and attends to nearby tokens only in some layers.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pabee_jax.models.config import ModelConfig

_MOST_EXACT_DISTANCE = 128


class SideInputs(NamedTuple):
    """What layers read beside their parameters, hidden states and mask; None is nothing.

    `of_layer` selects one layer; before, the last three fields have a leading axis over the layers.

    Attributes:
        position_bias: (heads, seq, seq), added to the attention scores by the positions of query
            and key.
        rotary_base: the base of the angles by which queries and keys are rotated.
        window: the largest distance between a token and the tokens to which it attends.
        is_first: whether the layer is the first.
    """

    position_bias: Float[Array, "heads seq seq"] | None = None
    rotary_base: Float[Array, "..."] | None = None
    window: Int[Array, "..."] | None = None
    is_first: Bool[Array, "..."] | None = None

    def of_layer(self, layer: int | Int[Array, ""]) -> "SideInputs":
        """Return the side inputs of a layer (from 0, possibly traced)."""
        of_layers = (self.rotary_base, self.window, self.is_first)
        return SideInputs(
            self.position_bias, *(None if values is None else values[layer] for values in of_layers)
        )

    def of_heads_as_rows(self, rows: int, length: int) -> "SideInputs":
        """Return the side inputs of rows with one head: of the first head, of the second, ..."""
        if self.position_bias is None:
            return self
        bias = self.position_bias[:, None, None, :length, :length]
        heads, *_, queries, keys = bias.shape
        bias = jnp.broadcast_to(bias, (heads, rows, 1, queries, keys))
        return self._replace(position_bias=bias.reshape(heads * rows, 1, queries, keys))

    def on_scores(
        self,
        scores: Float[Array, "batch heads queries keys"],
        mask: Bool[Array, "batch keys"],
        first_key: int | Int[Array, ""] = 0,
    ) -> Float[Array, "batch heads queries keys"]:
        """Return attention scores with the position bias, and without the tokens out of reach.

        Query i is token i of a row, and key i is token `first_key + i`.
        """
        queries, keys = scores.shape[-2:]
        if self.position_bias is not None:
            bias = self.position_bias[..., :queries, :]
            scores = scores + jax.lax.dynamic_slice_in_dim(
                bias, first_key, keys, axis=bias.ndim - 1
            )
        within_reach = mask[:, None, None, :]
        if self.window is not None:
            distance = jnp.abs(jnp.arange(queries)[:, None] - first_key - jnp.arange(keys))
            within_reach = within_reach & (distance <= self.window)
        return jnp.where(within_reach, scores, jnp.finfo(jnp.float32).min)

    def rotated(
        self, heads: Float[Array, "*tokens heads features"], positions: Int[Array, "..."]
    ) -> Float[Array, "*tokens heads features"]:
        """Return queries or keys rotated by their positions (RoFormer, arXiv 2104.09864).

        Feature i is paired with feature i + features / 2, and both are rotated by
        position * base ** (-2 i / features).
        """
        if self.rotary_base is None:
            return heads
        half = heads.shape[-1] // 2
        frequencies = 1 / self.rotary_base ** (jnp.arange(half, dtype=jnp.float32) / half)
        angles = (positions[..., None] * frequencies)[..., None, :]
        first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
        sine, cosine = jnp.sin(angles), jnp.cos(angles)
        result = [first * cosine - second * sine, second * cosine + first * sine]
        return jnp.concatenate(result, axis=-1).astype(heads.dtype)


def side_inputs(
    config: ModelConfig,
    position_bias: Float[Array, "buckets heads"] | None,
    length: int,
) -> SideInputs:
    """Return the side inputs of all layers for rows of up to `length` tokens.

    Args:
        config: the model's configuration.
        position_bias: the bias of every bucket of relative positions, for every head.
        length: the most tokens of a row.
    """
    result = SideInputs()
    if position_bias is not None:
        buckets = relative_buckets(length, config.relative_buckets)
        # With parameters that are constants of a program (ONNX), so is the bias.
        with jax.ensure_compile_time_eval():
            bias = position_bias[buckets].transpose(2, 0, 1)
        result = result._replace(position_bias=bias)
    kinds = config.layer_kinds
    if kinds is not None:
        result = result._replace(
            rotary_base=jnp.array(kinds.rotary_bases, jnp.float32),
            window=jnp.array(kinds.windows, jnp.int32),
            is_first=jnp.arange(config.num_hidden_layers) == 0,
        )
    return result


def relative_buckets(length: int, num_buckets: int) -> Int[np.ndarray, "queries keys"]:
    """Return the bucket of every pair of positions (T5, arXiv 1910.10683, appendix; MPNet).

    Half of the buckets are for keys before the query, and half for keys after it. Half of each half
    are for one distance each, and the rest for ranges that grow with the distance, up to 128.
    """
    distances = np.arange(length)[:, None] - np.arange(length)
    half = num_buckets // 2
    exact = half // 2
    size = np.abs(distances)
    far = np.log(np.maximum(size, 1).astype(np.float32) / np.float32(exact))
    far = far / np.float32(math.log(_MOST_EXACT_DISTANCE / exact)) * np.float32(half - exact)
    far = np.minimum(exact + far.astype(np.int64), half - 1)
    return np.where(distances < 0, half, 0) + np.where(size < exact, size, far)
