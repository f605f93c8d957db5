"""Sequence classifiers of transformers with random parameters, and what their layers compute.

Requires torch and transformers 5. This file does not use pabee_jax.
"""

import zlib
from typing import Any

import numpy as np
import torch
from rows import TYPES
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

VOCABULARY, PADDING, LENGTH = 60, 1, 11
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "pad_token_id": PADDING,
    "num_labels": 3,
    # With BERT's epsilon of 1e-12, a wrong epsilon would not change the outputs.
    "layer_norm_eps": 1e-3,
}
# By model type: the fields that differ, and the encoder's attribute and list of layers.
FAMILIES: dict[str, tuple[dict[str, Any], str, str]] = {
    "bert": ({}, "bert", "encoder.layer"),
    "roberta": ({"type_vocab_size": 1}, "roberta", "encoder.layer"),
    "xlm-roberta": ({"type_vocab_size": 1}, "roberta", "encoder.layer"),
    "camembert": ({"type_vocab_size": 1}, "roberta", "encoder.layer"),
    "electra": ({"embedding_size": 16}, "electra", "encoder.layer"),
    "distilbert": (
        {"dim": 32, "n_heads": 4, "hidden_dim": 48, "hidden_size": None, "layer_norm_eps": None},
        "distilbert",
        "transformer.layer",
    ),
    "mpnet": ({}, "mpnet", "encoder.layer"),
    "albert": (
        {"embedding_size": 16, "inner_group_num": 2, "num_hidden_groups": 1},
        "albert",
        "encoder.albert_layer_groups",
    ),
    "modernbert": (
        {"norm_eps": 1e-3, "local_attention": 6, "layer_norm_eps": None},
        "model",
        "layers",
    ),
}


def make_classifier(model_type: str, layers: int, **overrides: Any) -> PreTrainedModel:
    """Return a sequence classifier whose parameters are all random."""
    fields = _SIZES | FAMILIES[model_type][0]
    fields |= {"n_layers" if model_type == "distilbert" else "num_hidden_layers": layers}
    fields = {name: value for name, value in (fields | overrides).items() if value is not None}
    config = AutoConfig.for_model(model_type, **fields)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(zlib.crc32(model_type.encode()))
    for module in model.modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(module, nn.Embedding):
            module.weight.data = 0.5 * torch.randn(weight.shape, generator=generator)
        elif isinstance(module, nn.LayerNorm | nn.Linear):
            noise = torch.randn(weight.shape, generator=generator)
            is_norm = isinstance(module, nn.LayerNorm)
            module.weight.data = 1 + 0.1 * noise if is_norm else noise / noise.shape[1] ** 0.5
            if bias is not None:
                module.bias.data = 0.1 * torch.randn(bias.shape, generator=generator)
    return model.eval()


def make_batch(model_type: str) -> dict[str, np.ndarray]:
    """Return rows of 11, 7, 2 and 5 random tokens; padding is at the end of a row."""
    random = np.random.default_rng(zlib.crc32(model_type.encode()))
    lengths = np.array([LENGTH, 7, 2, 5])[:, None]
    positions = np.arange(LENGTH)
    mask = positions < lengths
    ids = random.integers(PADDING + 1, VOCABULARY, mask.shape)
    batch = {
        "input_ids": np.where(mask, ids, PADDING).astype(np.int32),
        "attention_mask": mask.astype(np.int32),
    }
    types = ((2 * positions >= lengths) & mask).astype(np.int32)
    return batch | {"token_type_ids": types * (model_type in TYPES)}


def outputs(model: PreTrainedModel, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the input of the first layer, the output of every layer, and logits.

    "logits" has, for every layer, what the classification head says of the layer's output, and
    "mean_logits" what it says if it reads the mean over the tokens in place of the first token.
    """
    _, attribute, layers = FAMILIES[model.config.model_type]
    encoder = getattr(model, attribute)
    states: list[Tensor] = []

    def before(module, arguments, keywords):
        if not states:
            states.append(arguments[0] if arguments else keywords["hidden_states"])

    def after(module, arguments, output):
        states.append(output[0] if isinstance(output, tuple) else output)

    hooks = []
    for layer in encoder.get_submodule(layers):
        hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(layer.register_forward_hook(after))
    inputs = {name: torch.from_numpy(value).long() for name, value in batch.items()}
    if model.config.model_type not in TYPES:
        del inputs["token_type_ids"]
    with torch.no_grad():
        last_logits = model(**inputs).logits
        mask = inputs["attention_mask"][:, :, None]
        logits = [_head(model, encoder, hidden) for hidden in states[1:]]
        mean_logits = [_head(model, encoder, hidden, mask) for hidden in states[1:]]
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(logits[-1], last_logits, atol=1e-5, rtol=1e-5)
    arrays = {
        "embeddings": states[0],
        "hidden_states": torch.stack(states[1:]),
        "logits": torch.stack(logits),
        "mean_logits": torch.stack(mean_logits),
    }
    return {name: value.numpy() for name, value in arrays.items()}


def _head(
    model: PreTrainedModel, encoder: nn.Module, hidden: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Return the logits of the classification head for the output of a layer.

    Args:
        mask: (rows, tokens, 1); the head reads the mean over the tokens in it. None: the first.
    """
    kind = model.config.model_type
    if kind == "modernbert":
        hidden = encoder.final_norm(hidden)
    if mask is not None:
        hidden = ((hidden * mask).sum(dim=1) / mask.sum(dim=1))[:, None]
    if kind == "bert":
        return model.classifier(encoder.pooler(hidden))
    if kind == "albert":
        return model.classifier(encoder.pooler_activation(encoder.pooler(hidden[:, 0])))
    if kind == "distilbert":
        return model.classifier(torch.relu(model.pre_classifier(hidden[:, 0])))
    if kind == "modernbert":
        return model.classifier(model.head(hidden[:, 0]))
    return model.classifier(hidden)
