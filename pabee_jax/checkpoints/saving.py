"""Saving of a checkpoint directory, and of the criterion in one that exists."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from safetensors.numpy import save

from pabee_jax import criteria
from pabee_jax.checkpoints.files import read_config_json
from pabee_jax.checkpoints.model_card import (
    TrainingFacts,
    may_write,
    model_card,
    with_criterion,
)
from pabee_jax.checkpoints.names import Tensors, to_flax_names, to_tensors
from pabee_jax.checkpoints.pretrained import Pretrained, describe_exits
from pabee_jax.criteria import ONLY_LAST_EXIT, ExitCriterion
from pabee_jax.data import used_rows
from pabee_jax.data.tokenization import save_tokenizer
from pabee_jax.errors import InputError
from pabee_jax.io import storage
from pabee_jax.io.atomic import write_atomically
from pabee_jax.models.config import EXIT_CHOICES, PABEE_EXITS, PABEE_FAMILIES


def save_pretrained(
    pretrained: Pretrained,
    directory: str | os.PathLike,
    *,
    for_pytorch: bool = False,
    training: TrainingFacts | None = None,
) -> None:
    """Save a checkpoint in Hugging Face's format, with a model card.

    A README.md that is not a card of pabee_jax is left as it is.

    PyTorch PABEE can load the checkpoint if the exits are PABEE's. `model.safetensors` is written
    last, and atomically, so a directory with `model.safetensors` is complete.

    Args:
        pretrained: the contents of the checkpoint.
        directory: a local path or a `gs://` address.
        for_pytorch: raise an error if PyTorch PABEE cannot load the checkpoint.
        training: what the card says of the training; None if nothing is known.

    Raises:
        InputError: `for_pytorch` is true and PyTorch PABEE cannot compute these exits or they were
            never trained, or the checkpoint cannot be uploaded.
    """
    model, names = pretrained.model, pretrained.output_names
    if for_pytorch and pretrained.trained_exits == "last":
        raise InputError(f"PyTorch PABEE would use exits that were never trained: {ONLY_LAST_EXIT}")
    if for_pytorch and model.config.family not in PABEE_FAMILIES:
        raise InputError(
            f"PyTorch PABEE cannot run this model: it is {model.config.family}, but PyTorch PABEE "
            f"has {' and '.join(PABEE_FAMILIES)} only"
        )
    if for_pytorch and not model.config.is_pabee:
        raise InputError(
            "PyTorch PABEE cannot run this model: its exits have "
            f"{describe_exits(model.config.exits)}, but PyTorch PABEE requires "
            f"{describe_exits(PABEE_EXITS)}"
        )
    # For exits that PyTorch PABEE cannot compute, other libraries can load the encoder only.
    class_name = "ForSequenceClassificationWithPabee" if model.config.is_pabee else "Model"
    values = {
        **pretrained.hugging_face_config,
        **model.config.exits,
        "architectures": [f"{pretrained.family.class_prefix}{class_name}"],
        "num_labels": model.config.num_labels,
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
        "problem_type": "single_label_classification" if pretrained.label_names else "regression",
        "trained_exits": pretrained.trained_exits,
    }
    if pretrained.trained_exits == "all":
        del values["trained_exits"]
    if model.config.exits == PABEE_EXITS:
        for name in EXIT_CHOICES:
            del values[name]
    values.pop("early_exit", None)
    if pretrained.criterion is not None:
        values["early_exit"] = criteria.to_config(pretrained.criterion)
    card = model_card(pretrained, training)
    write_checkpoint(pretrained, directory, values, to_tensors(model), card)


def write_checkpoint(
    pretrained: Pretrained,
    directory: str | os.PathLike,
    values: Mapping[str, Any],
    tensors: Tensors,
    card: str | None = None,
    flax: bool = False,
) -> None:
    """Write a checkpoint's tokenizer, `config.json` and, last and atomically, its tensors.

    Args:
        pretrained: the contents of the checkpoint; only its tokenizer is written.
        directory: a local path or a `gs://` address.
        values: the values of `config.json`.
        tensors: the tensors by name.
        card: the text of README.md; None for no such file.
        flax: write `flax_model.msgpack` instead of `model.safetensors`.
    """
    tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    path = storage.path_of(directory)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; a checkpoint is a directory")
    with storage.local_folder(path) as folder:
        if pretrained.tokenizer is not None:
            save_tokenizer(pretrained.tokenizer, folder, pretrained.max_length)
        if card is not None and may_write(folder / "README.md"):
            write_atomically(folder / "README.md", lambda path: path.write_text(card))
        write_atomically(folder / "config.json", lambda path: path.write_text(_json(values)))
        if flax:
            from flax.serialization import msgpack_serialize

            name, data = "flax_model.msgpack", msgpack_serialize(to_flax_names(tensors))
        else:
            # safetensors' save_file creates a file that only its owner can read.
            name, data = "model.safetensors", save(tensors, metadata={"format": "pt"})
        write_atomically(folder / name, lambda path: path.write_bytes(data))


def save_criterion(
    directory: epath.Path, criterion: ExitCriterion, guarantee: Mapping[str, Any] | None = None
) -> None:
    """Save an exit criterion in a checkpoint's config.json, and name it in the model card.

    Args:
        directory: the checkpoint directory.
        criterion: the criterion with which the checkpoint is loaded from now on.
        guarantee: the result of risk control for this setting, saved with the criterion.

    Raises:
        InputError: config.json cannot be read or written.
    """
    values = read_config_json(directory)
    values["early_exit"] = criteria.to_config(criterion)
    if guarantee is not None:
        values["early_exit"]["guarantee"] = dict(guarantee)
    card, contents = directory / "README.md", {"config.json": _json(values)}
    if card.exists() and may_write(card):
        contents["README.md"] = with_criterion(card.read_text(encoding="utf-8"), criterion)
    _replace(directory, contents)


def save_rows_used(directory: epath.Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Save the record of used rows in a checkpoint's config.json; see `data.used_rows`.

    Raises:
        InputError: config.json cannot be read or written.
    """
    values = read_config_json(directory) | {used_rows.KEY: list(records)}
    _replace(directory, {"config.json": _json(values)})


def _replace(directory: epath.Path, contents: Mapping[str, str]) -> None:
    """Write files of a checkpoint, each atomically."""
    for name, text in contents.items():
        try:
            write_atomically(directory / name, lambda path, text=text: path.write_text(text))
        except Exception as error:  # The exception class depends on the kind of storage.
            reason = storage.reason_of(error)
            raise InputError(f"{directory / name} cannot be written: {reason}") from None


def _json(values: Any) -> str:
    return json.dumps(values, indent=2, sort_keys=True) + "\n"
