"""An ordinary sequence classifier of Hugging Face, cut out of a model with exits."""

import dataclasses
import os
from typing import Any

import numpy as np
from flax import nnx

from pabee_jax.checkpoints.families import FAMILY_NAMES
from pabee_jax.checkpoints.names import to_tensors
from pabee_jax.checkpoints.pretrained import Pretrained
from pabee_jax.checkpoints.saving import write_checkpoint
from pabee_jax.criteria import ONLY_LAST_EXIT
from pabee_jax.errors import InputError
from pabee_jax.models.config import EXIT_CHOICES, PABEE_FAMILIES
from pabee_jax.models.encoder import EarlyExitModel
from pabee_jax.models.parameters import merge, split

# The prefixes of the Flax classes of transformers 4; transformers 5 has none.
_FLAX_PREFIXES = ("Bert", "Albert", "Roberta", "XLMRoberta", "Electra", "DistilBert")


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
        InputError: there is no such exit, the exit was never trained, the head of Hugging Face's
            class has another shape, or Hugging Face has no Flax class for the model type.
    """
    config, family = pretrained.model.config, pretrained.family
    if not 1 <= exit <= config.num_hidden_layers:
        raise InputError(f"exit is {exit}; the model has the exits 1 to {config.num_hidden_layers}")
    if pretrained.trained_exits == "last" and exit < config.num_hidden_layers:
        raise InputError(f"exit {exit} was never trained: {ONLY_LAST_EXIT}")
    if flax and family.class_prefix not in _FLAX_PREFIXES:
        raise InputError(
            f"transformers has no Flax class for {config.family}; it has one for "
            f"{', '.join(_FLAX_PREFIXES)}"
        )
    if config.exit_pooling not in family.head_poolings:
        raise InputError(
            "the exits read the mean over the tokens, but the classification head of "
            f"{config.family} in transformers reads the first token; convert --to onnx and "
            "pabee-jax export write such exits, and training with --config.pooling=cls gives exits "
            "that read the first token"
        )
    model = truncated(pretrained.model, exit)
    values = {
        name: value
        for name, value in pretrained.hugging_face_config.items()
        if name not in (*EXIT_CHOICES, "early_exit", "trained_exits")
    }
    values |= {
        "architectures": [f"{family.class_prefix}ForSequenceClassification"],
        family.names.get("num_hidden_layers", "num_hidden_layers"): exit,
        **family.head_fields(model.config),
    }
    write_checkpoint(pretrained, directory, values, _with_head(model), flax=flax)


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


def _with_head(model: EarlyExitModel) -> dict[str, np.ndarray]:
    """Return the encoder's tensors with the last exit as the classification head."""
    config, parameters = model.config, split(model)[1]
    names = FAMILY_NAMES[config.family]
    result = {
        name: value
        for name, value in to_tensors(model).items()
        if name.startswith(f"{names.prefix}.")
    }

    def last(name: str, is_per_exit: bool) -> np.ndarray:
        value = np.asarray(parameters[name], np.float32)
        value = value[-1] if is_per_exit else value
        return value.T if name.endswith("kernel") else value

    pooler = names.poolers[0]
    if config.family in PABEE_FAMILIES:  # They have the pooler in the encoder.
        pooler = f"{names.prefix}.{pooler}"
    for module, target, is_per_exit in (
        ("pooler", pooler, config.exit_pooler == "per_exit"),
        ("classifiers", names.classifier, True),
    ):
        result[f"{target}.weight"] = last(f"{module}.kernel", is_per_exit)
        result[f"{target}.bias"] = last(f"{module}.bias", is_per_exit)
    return dict(names.restore(result))
