"""The families of encoders: how the values of a `config.json` become a `ModelConfig`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from pabee_jax.errors import InputError, shown

# A configuration -> fields of another one.
Derive = Callable[[Any], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Family:
    """How one model type of Hugging Face is read.

    Attributes:
        name: the family, `ModelConfig.family`: it decides the layer's class (`models/groups.py`)
            and the names of the tensors (`checkpoints/families.py`).
        class_prefix: the prefix of its classes in transformers: "Bert" for `BertModel`.
        derive: returns the fields of `ModelConfig` that the configuration does not have under the
            same name.
        names: the name in `config.json` of a field of `ModelConfig`, if the names differ.
        head_poolings: what the classification head of transformers may read, as
            `ModelConfig.exit_pooling`.
        head_fields: (`ModelConfig`) -> the fields of `config.json` that a sequence classifier of
            these layers, with this head, has beside the number of layers.
    """

    name: str
    class_prefix: str
    derive: Derive
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    head_poolings: tuple[str, ...] = ("cls",)
    head_fields: Derive = lambda config: {}


@dataclasses.dataclass(frozen=True)
class LayerKinds:
    """The layers of ModernBERT, which attend globally and locally in turn.

    Attributes:
        rotary_bases: the base of every layer's rotary angles.
        windows: the largest distance between a token and the tokens to which it attends, in every
            layer; a global layer has a distance that no row reaches.
    """

    rotary_bases: tuple[float, ...]
    windows: tuple[int, ...]


# A distance that no row reaches.
_EVERYWHERE = 2**30
# MPNet computes its position bias with this number of buckets, whatever its configuration says.
_MPNET_BUCKETS = 32


def _own_layers(config: Any) -> dict[str, Any]:
    """Return the fields of an encoder in which every layer has its own parameters."""
    return {
        "embedding_size": config.hidden_size,
        "num_hidden_groups": config.num_hidden_layers,
        "inner_group_num": 1,
    }


def _bert(config: Any) -> dict[str, Any]:
    return _own_layers(config) | {"exit_dropout_prob": config.hidden_dropout_prob}


def _head_dropout(config: Any) -> float:
    rate = config.classifier_dropout
    return config.hidden_dropout_prob if rate is None else rate


def _roberta(config: Any) -> dict[str, Any]:
    padding = config.pad_token_id
    if not isinstance(padding, int) or padding < 0:
        raise InputError(
            f"config.json: pad_token_id is {shown(padding)}; it must be a token id, after which "
            f"the positions of {config.model_type} start"
        )
    return _own_layers(config) | {
        "position_offset": padding + 1,
        "exit_dropout_prob": _head_dropout(config),
    }


def _electra(config: Any) -> dict[str, Any]:
    return _own_layers(config) | {
        "embedding_size": config.embedding_size,
        "exit_act": "gelu",
        "exit_dropout_prob": _head_dropout(config),
    }


def _distilbert(config: Any) -> dict[str, Any]:
    return _own_layers(config) | {
        "type_vocab_size": 0,
        "layer_norm_eps": 1e-12,
        "exit_act": "relu",
        "exit_dropout_prob": config.seq_classif_dropout,
    }


def _mpnet(config: Any) -> dict[str, Any]:
    # MPNet's padding id is 1 in the code of transformers, whatever its configuration says.
    return _own_layers(config) | {
        "type_vocab_size": 0,
        "position_offset": 2,
        "relative_buckets": _MPNET_BUCKETS,
        "exit_dropout_prob": config.hidden_dropout_prob,
    }


def _modernbert(config: Any) -> dict[str, Any]:
    for name in ("attention_bias", "mlp_bias", "norm_bias"):
        if getattr(config, name):
            raise InputError(f"config.json: {name} is true; only false is supported")
    bases, windows = [], []
    for kind in config.layer_types:
        rotary = config.rope_parameters[kind]
        if rotary["rope_type"] != "default":
            raise InputError(
                f"config.json: rope_type is {shown(rotary['rope_type'])}; only 'default' is "
                "supported"
            )
        bases.append(float(rotary["rope_theta"]))
        windows.append(_EVERYWHERE if kind == "full_attention" else config.local_attention // 2)
    return _own_layers(config) | {
        "type_vocab_size": 0,
        "exit_act": config.classifier_activation,
        "exit_dropout_prob": config.classifier_dropout,
        "layer_kinds": LayerKinds(tuple(bases), tuple(windows)),
    }


def _modernbert_head(config: Any) -> dict[str, Any]:
    is_global = [window == _EVERYWHERE for window in config.layer_kinds.windows]
    return {
        "classifier_pooling": config.exit_pooling,
        "classifier_bias": True,
        "layer_types": ["full_attention" if value else "sliding_attention" for value in is_global],
    }


# By `model_type`.
FAMILIES: dict[str, Family] = {
    "bert": Family("bert", "Bert", _bert),
    "albert": Family(
        "albert",
        "Albert",
        lambda config: {"exit_dropout_prob": config.classifier_dropout_prob},
        head_fields=lambda config: {"num_hidden_groups": config.num_hidden_groups},
    ),
    "roberta": Family("roberta", "Roberta", _roberta),
    "xlm-roberta": Family("roberta", "XLMRoberta", _roberta),
    "camembert": Family("roberta", "Camembert", _roberta),
    "distilbert": Family(
        "distilbert",
        "DistilBert",
        _distilbert,
        {
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
            "hidden_act": "activation",
            "hidden_dropout_prob": "dropout",
            "attention_probs_dropout_prob": "attention_dropout",
        },
    ),
    "electra": Family("electra", "Electra", _electra),
    "mpnet": Family("mpnet", "MPNet", _mpnet),
    "modernbert": Family(
        "modernbert",
        "ModernBert",
        _modernbert,
        {
            "hidden_act": "hidden_activation",
            "layer_norm_eps": "norm_eps",
            "hidden_dropout_prob": "mlp_dropout",
            "attention_probs_dropout_prob": "attention_dropout",
        },
        head_poolings=("cls", "mean"),
        head_fields=_modernbert_head,
    ),
}


def family_of(model_type: Any) -> Family:
    """Return the family of a model type.

    Raises:
        InputError: the model type is not supported.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(
            f"the model type is {shown(model_type)}; supported are {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]
