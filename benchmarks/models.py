"""Models of known shapes with random weights, and random token ids as their input."""

from typing import Any

import numpy as np
from flax import nnx

from pabee_jax.models.config import ModelConfig
from pabee_jax.models.encoder import EarlyExitModel

_BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
}
SHAPES: dict[str, dict[str, Any]] = {
    "bert-base": {"model_type": "bert", "vocab_size": 30_522, **_BASE},
    "albert-base": {
        "model_type": "albert",
        "vocab_size": 30_000,
        "embedding_size": 128,
        "hidden_act": "gelu_new",
        **_BASE,
    },
    "bert-large": {
        "model_type": "bert",
        "vocab_size": 30_522,
        **_BASE,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "albert-xxlarge": {
        "model_type": "albert",
        "vocab_size": 30_000,
        **_BASE,
        "embedding_size": 128,
        "hidden_act": "gelu_new",
        "hidden_size": 4096,
        "num_attention_heads": 64,
        "intermediate_size": 16384,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    "minilm": {
        "model_type": "bert",
        "vocab_size": 30_522,
        **_BASE,
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "intermediate_size": 1536,
    },
    "mini": {
        "model_type": "bert",
        "vocab_size": 30_522,
        **_BASE,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
    },
    # For tests of the benchmarks.
    "tiny": {
        "model_type": "albert",
        "vocab_size": 100,
        **_BASE,
        "embedding_size": 16,
        "num_hidden_layers": 3,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    },
}


def random_model(name: str, dtype: str = "float32", **exits: str) -> EarlyExitModel:
    """Return a model with random float32 weights.

    Args:
        name: its shape, a key of `SHAPES`.
        dtype: its compute type.
        exits: `exit_pooler` and `exit_pooling`; by default those of PABEE.
    """
    config = ModelConfig.from_hugging_face(SHAPES[name] | exits, 2)
    return EarlyExitModel(config, dtype=dtype, rngs=nnx.Rngs(0))


def random_tokens(config: ModelConfig, rows: int, length: int) -> dict[str, np.ndarray]:
    """Return random token ids of shape (rows, length), without padding."""
    random = np.random.default_rng(0)
    ids = random.integers(1, config.vocab_size, (rows, length), dtype=np.int32)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": 0 * ids}
