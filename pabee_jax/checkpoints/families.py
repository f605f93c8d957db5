"""The names of each family's tensors in PyTorch checkpoints.

One table of regular expressions per family maps each module of the model to PyTorch's name of the
module. A new family needs an entry in `FAMILY_NAMES`.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

Tensors = Mapping[str, np.ndarray]

# The pooler of all exits, where no module of Hugging Face's encoder is the same.
EXIT_POOLER = "exit_pooler"


@dataclasses.dataclass(frozen=True)
class FamilyNames:
    """How a family names its tensors, without `prefix`.

    Attributes:
        prefix: the prefix of the encoder's tensors, such as "bert".
        modules: pairs of a regular expression for the model's module path and PyTorch's path.
        poolers: the modules from which the exits' poolers are loaded if the checkpoint has no
            exits: the first that exists.
        classifier: the last linear map of Hugging Face's classification head.
        prepare: turns a checkpoint's tensors into tensors of the names above.
        restore: undoes `prepare`.
    """

    prefix: str
    modules: tuple[tuple[str, str], ...]
    poolers: tuple[str, ...] = ()
    classifier: str = "classifier"
    prepare: Callable[[Tensors], Tensors] = lambda tensors: tensors
    restore: Callable[[Tensors], Tensors] = lambda tensors: tensors


_EMBEDDINGS = (
    (r"embeddings\.word", r"embeddings.word_embeddings"),
    (r"embeddings\.position", r"embeddings.position_embeddings"),
    (r"embeddings\.token_type", r"embeddings.token_type_embeddings"),
    (r"embeddings\.norm", r"embeddings.LayerNorm"),
)
_LAYER = r"groups\.(\d+)\.inner\.0\."
_IN_BERT = r"encoder.layer.\1."
_FEED_FORWARD = (
    (_LAYER + r"intermediate", _IN_BERT + r"intermediate.dense"),
    (_LAYER + r"output", _IN_BERT + r"output.dense"),
    (_LAYER + r"output_norm", _IN_BERT + r"output.LayerNorm"),
)
_BERT = (
    *_EMBEDDINGS,
    (_LAYER + r"(query|key|value)_projection", _IN_BERT + r"attention.self.\2"),
    (_LAYER + r"attention_output", _IN_BERT + r"attention.output.dense"),
    (_LAYER + r"attention_norm", _IN_BERT + r"attention.output.LayerNorm"),
    *_FEED_FORWARD,
)
_PROJECTIONS = ("query", "key", "value")
_OWN_POOLER = ((r"pooler", EXIT_POOLER),)

_ALBERT_LAYER = r"groups\.(\d+)\.inner\.(\d+)\."
_IN_ALBERT = r"encoder.albert_layer_groups.\1.albert_layers.\2."
_ALBERT = (
    *_EMBEDDINGS,
    (r"embeddings\.projection", r"encoder.embedding_hidden_mapping_in"),
    (_ALBERT_LAYER + r"(query|key|value)_projection", _IN_ALBERT + r"attention.\3"),
    (_ALBERT_LAYER + r"attention_output", _IN_ALBERT + r"attention.dense"),
    (_ALBERT_LAYER + r"attention_norm", _IN_ALBERT + r"attention.LayerNorm"),
    (_ALBERT_LAYER + r"intermediate", _IN_ALBERT + r"ffn"),
    (_ALBERT_LAYER + r"output", _IN_ALBERT + r"ffn_output"),
    (_ALBERT_LAYER + r"output_norm", _IN_ALBERT + r"full_layer_layer_norm"),
    (r"pooler", r"pooler"),
)

_IN_DISTILBERT = r"transformer.layer.\1."
_DISTILBERT = (
    *_EMBEDDINGS,
    *((_LAYER + f"{n}_projection", _IN_DISTILBERT + f"attention.{n[0]}_lin") for n in _PROJECTIONS),
    (_LAYER + r"attention_output", _IN_DISTILBERT + r"attention.out_lin"),
    (_LAYER + r"attention_norm", _IN_DISTILBERT + r"sa_layer_norm"),
    (_LAYER + r"intermediate", _IN_DISTILBERT + r"ffn.lin1"),
    (_LAYER + r"output", _IN_DISTILBERT + r"ffn.lin2"),
    (_LAYER + r"output_norm", _IN_DISTILBERT + r"output_layer_norm"),
    *_OWN_POOLER,
)

_MPNET = (
    *_EMBEDDINGS,
    (r"position_bias", r"encoder.relative_attention_bias"),
    *((_LAYER + f"{n}_projection", _IN_BERT + f"attention.attn.{n[0]}") for n in _PROJECTIONS),
    (_LAYER + r"attention_output", _IN_BERT + r"attention.attn.o"),
    (_LAYER + r"attention_norm", _IN_BERT + r"attention.LayerNorm"),
    *_FEED_FORWARD,
    *_OWN_POOLER,
)

_IN_MODERNBERT = r"layers.\1."
_MODERNBERT = (
    (r"embeddings\.word", r"embeddings.tok_embeddings"),
    (r"embeddings\.norm", r"embeddings.norm"),
    (_LAYER + r"(query|key|value)_projection", _IN_MODERNBERT + r"attn.\2"),
    (_LAYER + r"attention_output", _IN_MODERNBERT + r"attn.Wo"),
    (_LAYER + r"attention_norm", _IN_MODERNBERT + r"attn_norm"),
    (_LAYER + r"(intermediate|gate)", _IN_MODERNBERT + r"mlp.\2"),
    (_LAYER + r"output", _IN_MODERNBERT + r"mlp.Wo"),
    (_LAYER + r"output_norm", _IN_MODERNBERT + r"mlp_norm"),
    (r"final_norm", r"final_norm"),
    *_OWN_POOLER,
)


# transformers stacks the kernels of these products, in this order.
_STACKED = {
    "attn.Wqkv": ("attn.query", "attn.key", "attn.value"),
    "mlp.Wi": ("mlp.intermediate", "mlp.gate"),
}


def _prepare_modernbert(tensors: Tensors) -> Tensors:
    """Split stacked kernels, and fold the scale of the head's LayerNorm into the classifier."""
    result = {}
    for name, value in tensors.items():
        stacked = next((part for part in _STACKED if f"{part}." in name), None)
        if stacked is None or len(value) % len(_STACKED[stacked]):
            result[name] = value
            continue
        parts = np.split(value, len(_STACKED[stacked]))
        for module, part in zip(_STACKED[stacked], parts, strict=True):
            result[name.replace(stacked, module)] = part
    if "layers.0.attn_norm.weight" not in result and "layers.0.mlp_norm.weight" in result:
        # The first layer has no LayerNorm before its attention; see `ModernBertLayer`.
        result["layers.0.attn_norm.weight"] = np.ones_like(result["layers.0.mlp_norm.weight"])
    if "head.dense.weight" in result and "head.dense.bias" not in result:
        result["head.dense.bias"] = np.zeros(len(result["head.dense.weight"]), np.float32)
    scale = result.pop("head.norm.weight", None)
    if scale is not None and "classifier.weight" in result:
        result["classifier.weight"] = np.asarray(result["classifier.weight"], np.float32) * scale
    return result


def _restore_modernbert(tensors: Tensors) -> Tensors:
    """Stack the kernels again; a head gets a LayerNorm whose scale is in the classifier."""
    result = dict(tensors)
    result.pop("model.layers.0.attn_norm.weight", None)
    if "head.dense.weight" in result:
        result["head.norm.weight"] = np.ones(len(result["head.dense.weight"]), np.float32)
    for stacked, modules in _STACKED.items():
        for name in [name for name in result if f".{modules[0]}." in name]:
            parts = [result.pop(name.replace(modules[0], module)) for module in modules]
            result[name.replace(modules[0], stacked)] = np.concatenate(parts)
    return result


_HEAD_POOLERS = ("classifier.dense", "pooler.dense")
_HEAD_CLASSIFIER = "classifier.out_proj"
FAMILY_NAMES = {
    "bert": FamilyNames("bert", (*_BERT, (r"pooler", r"pooler.dense")), ("pooler.dense",)),
    "albert": FamilyNames("albert", _ALBERT, ("pooler",)),
    "roberta": FamilyNames("roberta", (*_BERT, *_OWN_POOLER), _HEAD_POOLERS, _HEAD_CLASSIFIER),
    "electra": FamilyNames(
        "electra",
        (*_BERT, (r"embeddings\.projection", r"embeddings_project"), *_OWN_POOLER),
        _HEAD_POOLERS,
        _HEAD_CLASSIFIER,
    ),
    "distilbert": FamilyNames("distilbert", _DISTILBERT, ("pre_classifier",)),
    "mpnet": FamilyNames("mpnet", _MPNET, _HEAD_POOLERS, _HEAD_CLASSIFIER),
    "modernbert": FamilyNames(
        "model",
        _MODERNBERT,
        ("head.dense",),
        prepare=_prepare_modernbert,
        restore=_restore_modernbert,
    ),
}
