"""An ordinary sequence classifier of Hugging Face, cut out of a model with exits."""

import dataclasses
import os
from typing import Any

import numpy as np
from flax import nnx

from pabee_jax.checkpoints.families import FAMILY_NAMES
from pabee_jax.checkpoints.names import to_tensors
from pabee_jax.checkpoints.pretrained import ENCODER_CLASSES, Pretrained, write_checkpoint
from pabee_jax.errors import InputError
from pabee_jax.models.config import EXIT_CHOICES, ModelConfig
from pabee_jax.models.encoder import EarlyExitModel
from pabee_jax.models.families import FAMILIES
from pabee_jax.models.parameters import merge, split

# The model types of which transformers 4 has a Flax class; transformers 5 has none.
_FLAX_TYPES = ("bert", "albert", "roberta", "xlm-roberta", "electra", "distilbert")


def save_plain(
    pretrained: Pretrained, directory: str | os.PathLike, exit: int, *, flax: bool = False
) -> None:
    """Save a sequence classifier that `transformers` loads: the model up to one of its exits.

    Args:
        pretrained: the model with exits.
        directory: a local path or a `gs://` address.
        exit: the exit, from 1, whose logits the classifier has.
        flax: write `flax_model.msgpack`, for the Flax classes of transformers 4.

    Raises:
        InputError: there is no such exit, the head of Hugging Face's class has another shape, or
            Hugging Face has no Flax class for the model type.
    """
    config = pretrained.model.config
    model_type = pretrained.hugging_face_config.get("model_type", config.family)
    if not 1 <= exit <= config.num_hidden_layers:
        raise InputError(f"exit is {exit}; the model has the exits 1 to {config.num_hidden_layers}")
    if flax and model_type not in _FLAX_TYPES:
        raise InputError(
            f"transformers has no Flax class for {model_type}; it has one for "
            f"{', '.join(_FLAX_TYPES)}"
        )
    if config.exit_pooling != "cls" and "classifier_pooling" not in _values(pretrained):
        raise InputError(
            f"the exits read the mean over the tokens, but the classification head of {model_type} "
            "reads the first token; train with --config.pooling=cls"
        )
    model = truncated(pretrained.model, exit)
    tensors = to_tensors(model)
    parameters = split(model)[1]
    values = _values(pretrained) | {"architectures": [classifier_class(model_type)]}
    names = FAMILIES[model_type].names
    values[names.get("num_hidden_layers", "num_hidden_layers")] = exit
    if config.family == "albert":
        values["num_hidden_groups"] = model.config.num_hidden_groups
    if config.family == "modernbert":
        values["classifier_pooling"], values["classifier_bias"] = config.exit_pooling, True
        if values.get("layer_types"):
            values["layer_types"] = values["layer_types"][:exit]
    write_checkpoint(
        pretrained, directory, values, _with_head(model, tensors, parameters), flax=flax
    )


def classifier_class(model_type: str) -> str:
    """Return the name of the class of `transformers` for sequence classifiers."""
    return f"{ENCODER_CLASSES[model_type].removesuffix('Model')}ForSequenceClassification"


def truncated(model: EarlyExitModel, exit: int) -> EarlyExitModel:
    """Return the unstacked model without the layers and exits after `exit`, which counts from 1.

    Raises:
        InputError: the layers up to `exit` share parameters in a way that no configuration
            describes.
    """
    config = model.config
    groups = config.layer_groups[:exit]
    kinds = config.layer_kinds
    shorter = dataclasses.replace(
        config,
        num_hidden_layers=exit,
        num_hidden_groups=groups[-1] + 1,
        layer_kinds=kinds
        and dataclasses.replace(
            kinds, rotary_bases=kinds.rotary_bases[:exit], windows=kinds.windows[:exit]
        ),
    )
    if shorter.layer_groups != groups:
        raise InputError(
            f"the first {exit} layers use {shorter.num_hidden_groups} groups of parameters in "
            "turns of different lengths, which config.json cannot describe; give another exit"
        )
    structure, shapes = split(
        nnx.eval_shape(lambda: EarlyExitModel(shorter, dtype=model.dtype.name, rngs=nnx.Rngs(0)))
    )
    parameters = split(model)[1]
    kept: dict[str, Any] = {}
    for name, shape in shapes.items():
        value = parameters[name]
        kept[name] = value if value.shape == shape.shape else value[:exit]
    return merge(structure, kept)


def _values(pretrained: Pretrained) -> dict[str, Any]:
    values = dict(pretrained.hugging_face_config)
    for name in (*EXIT_CHOICES, "early_exit"):
        values.pop(name, None)
    return values


def _with_head(
    model: EarlyExitModel, tensors: dict[str, np.ndarray], parameters: dict[str, Any]
) -> dict[str, np.ndarray]:
    """Return the encoder's tensors with the last exit as the classification head."""
    config: ModelConfig = model.config
    names = FAMILY_NAMES[config.family]
    result = {name: value for name, value in tensors.items() if name.startswith(f"{names.prefix}.")}

    def last(name: str, is_per_exit: bool) -> np.ndarray:
        value = np.asarray(parameters[name], np.float32)
        value = value[-1] if is_per_exit else value
        return value.T if name.endswith("kernel") else value

    pooler = names.poolers[0]
    if pooler.startswith("pooler"):  # BERT and ALBERT have the pooler in the encoder.
        pooler = f"{names.prefix}.{pooler}"
    for module, target, is_per_exit in (
        ("pooler", pooler, config.exit_pooler == "per_exit"),
        ("classifiers", names.classifier, True),
    ):
        result[f"{target}.weight"] = last(f"{module}.kernel", is_per_exit)
        result[f"{target}.bias"] = last(f"{module}.bias", is_per_exit)
    if config.family == "modernbert":  # Its scale is part of the classifier.
        result["head.norm.weight"] = np.ones(config.hidden_size, np.float32)
    return result
