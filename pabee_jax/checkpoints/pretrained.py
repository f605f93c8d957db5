"""A checkpoint directory as a whole: model, tokenizer, labels and criterion, read and written."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from safetensors.numpy import save

from pabee_jax import criteria
from pabee_jax.checkpoints.files import read_config_json, read_tensors, resolve
from pabee_jax.checkpoints.names import (
    CLASSIFIERS_NAMES,
    Tensors,
    canonical_name,
    classifiers_name,
    from_tensors,
    log_report,
    to_tensors,
)
from pabee_jax.criteria import ExitCriterion
from pabee_jax.data.dataset import Dataset
from pabee_jax.data.tokenization import Tokenizer, encode, load_tokenizer, save_tokenizer
from pabee_jax.errors import InputError
from pabee_jax.io import storage
from pabee_jax.io.atomic import write_atomically
from pabee_jax.models.config import EXIT_CHOICES, PABEE_EXITS, ModelConfig
from pabee_jax.models.encoder import EarlyExitModel

# Beyond this a tokenizer's `model_max_length` means "not known".
_UNKNOWN_LENGTH = 1_000_000
_ARCHITECTURES = {
    "bert": "BertForSequenceClassificationWithPabee",
    "albert": "AlbertForSequenceClassificationWithPabee",
}
# For exits that PyTorch PABEE does not have: the encoder alone is what others can load.
_ENCODERS = {"bert": "BertModel", "albert": "AlbertModel"}


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """What a checkpoint directory holds.

    Attributes:
        model: unstacked, parameters in float32.
        tokenizer: Hugging Face's.
        hugging_face_config: the values of `config.json`.
        label_names: class names by class id; empty for regression.
        max_length: tokens to which texts are cut.
        criterion: the exit criterion chosen for this model; None if none was.
    """

    model: EarlyExitModel
    tokenizer: Tokenizer
    hugging_face_config: dict[str, Any]
    label_names: tuple[str, ...]
    max_length: int
    criterion: ExitCriterion | None = None

    def with_max_length(self, max_length: int) -> "Pretrained":
        """The same, cutting texts to `max_length` tokens.

        Raises:
            InputError: the model does not have as many positions.
        """
        positions = self.model.config.max_position_embeddings
        if max_length > positions:
            raise InputError(
                f"max_seq_length is {max_length}, but the model has {positions} positions"
            )
        return dataclasses.replace(self, max_length=max_length)

    def encode(self, texts: Sequence[str], pairs: Sequence[str | None] | None) -> Dataset:
        """Token ids of texts and pairs of texts; longer ones are cut.

        Raises:
            InputError: the tokenizer has tokens that the model does not have.
        """
        dataset = encode(self.tokenizer, texts, pairs, self.max_length)
        highest, known = int(dataset.input_ids.max()), self.model.config.vocab_size
        if highest >= known:
            raise InputError(
                f"the tokenizer gives id {highest}, but the model knows only {known} tokens: they "
                "do not belong together"
            )
        return dataset


def load_pretrained(
    path_or_hub_id: str,
    *,
    num_labels: int | None = None,
    dtype: str = "float32",
    seed: int = 0,
    exits: Mapping[str, str] | None = None,
    classifier_bias: np.ndarray | None = None,
) -> Pretrained:
    """Reads a checkpoint from the hub or a directory.

    Args:
        num_labels: needed when the checkpoint has no internal classifiers; 1 means regression.
        seed: initialises what the checkpoint lacks (classifiers, perhaps the pooler).
        exits: `exit_pooler` and `exit_pooling` of a model whose exits are yet to be trained;
            absent, what `config.json` says, else PABEE's.
        classifier_bias: (C,) where classifiers that are missing start; absent, at 0.

    Raises:
        InputError: not a BERT or ALBERT checkpoint, damaged, of the wrong shape, out of reach,
            without classifiers and `num_labels`, or with other trained exits than `exits`.
    """
    directory = resolve(path_or_hub_id)
    values = read_config_json(directory)
    if num_labels is not None and num_labels < 1:
        raise InputError(f"num_labels must be at least 1, not {num_labels}")
    tensors = read_tensors(directory)
    trained_name, trained_labels = _trained_classifiers(tensors)
    num_labels = num_labels or trained_labels
    if num_labels is None:
        raise InputError(
            f"{path_or_hub_id} has no internal classifiers yet: give num_labels= to start them "
            "from scratch (1 means regression), or train them with train.py"
        )
    if exits is not None:
        if trained_labels is not None:
            _refuse_other_exits(values, exits, path_or_hub_id)
        values |= exits
    config = ModelConfig.from_hugging_face(values, num_labels)
    wanted_name = classifiers_name(config)
    if trained_name not in (None, wanted_name):
        raise InputError(
            f"{path_or_hub_id}: config.json asks for exits with {_told(config.exits)}, whose "
            f"parameters are called {wanted_name}.*, but the weights hold {trained_name}.*"
        )
    # After the configuration, because the library reads that as well and words its faults badly.
    tokenizer = load_tokenizer(directory)
    model, report = from_tensors(
        tensors,
        config,
        dtype=dtype,
        seed=seed,
        classifier_bias=classifier_bias,
        source=path_or_hub_id,
    )
    log_report(report, path_or_hub_id)
    chosen = values.get("early_exit")
    return Pretrained(
        model=model,
        tokenizer=tokenizer,
        hugging_face_config=values,
        label_names=_label_names(values, num_labels),
        max_length=_max_length(tokenizer, config),
        criterion=None if chosen is None else criteria.from_config(chosen),
    )


def save_pretrained(
    pretrained: Pretrained, directory: str | os.PathLike, *, for_pytorch: bool = False
) -> None:
    """Writes a Hugging Face style checkpoint; PyTorch PABEE can load it if its exits are PABEE's.

    The weights come last and appear by a rename: a directory with `model.safetensors` is complete.

    Args:
        directory: a local path or a `gs://` address.
        for_pytorch: the checkpoint is meant for PyTorch PABEE.

    Raises:
        InputError: `for_pytorch`, and PyTorch PABEE cannot compute these exits.
    """
    model, labels = pretrained.model, pretrained.label_names
    if for_pytorch and not model.config.is_pabee:
        raise InputError(
            f"PyTorch PABEE cannot run this model: its exits have {_told(model.config.exits)}, and "
            f"PyTorch PABEE's have {_told(PABEE_EXITS)}"
        )
    names = _ARCHITECTURES if model.config.is_pabee else _ENCODERS
    values = {
        **pretrained.hugging_face_config,
        **model.config.exits,
        "architectures": [names[model.config.family]],
        "num_labels": model.config.num_labels,
        "id2label": {str(index): name for index, name in enumerate(labels or ("score",))},
        "label2id": {name: index for index, name in enumerate(labels or ("score",))},
        "problem_type": "single_label_classification" if labels else "regression",
    }
    if model.config.is_pabee:
        for name in EXIT_CHOICES:
            del values[name]
    values.pop("early_exit", None)
    if pretrained.criterion is not None:
        values["early_exit"] = criteria.to_config(pretrained.criterion)
    tensors = {name: np.ascontiguousarray(value) for name, value in to_tensors(model).items()}
    with storage.local_folder(storage.path_of(directory)) as folder:
        save_tokenizer(pretrained.tokenizer, folder, pretrained.max_length)
        write_atomically(folder / "config.json", lambda path: path.write_text(_json(values)))
        write_atomically(
            folder / "model.safetensors",
            # The library's save_file would leave a file that only its owner can read.
            lambda path: path.write_bytes(save(tensors, metadata={"format": "pt"})),
        )


def save_criterion(
    directory: epath.Path, criterion: ExitCriterion, guarantee: Mapping[str, Any] | None = None
) -> None:
    """Makes `criterion` the one that a checkpoint is loaded with; changes its config.json only.

    Args:
        guarantee: how the setting was found, kept beside it.

    Raises:
        InputError: config.json cannot be read or written.
    """
    values = read_config_json(directory)
    values["early_exit"] = criteria.to_config(criterion)
    if guarantee is not None:
        values["early_exit"]["guarantee"] = dict(guarantee)
    try:
        write_atomically(directory / "config.json", lambda path: path.write_text(_json(values)))
    except Exception as error:  # Each kind of storage has its own.
        reason = storage.reason_of(error)
        raise InputError(f"{directory}/config.json cannot be written: {reason}") from None


def _json(values: Any) -> str:
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _trained_classifiers(tensors: Tensors) -> tuple[str, int] | tuple[None, None]:
    """What the checkpoint calls its internal classifiers, and their outputs; None without any."""
    for name, tensor in tensors.items():
        module, _, rest = canonical_name(name).partition(".")
        if module in CLASSIFIERS_NAMES and rest == "0.weight":
            return module, tensor.shape[0]
    return None, None


def _refuse_other_exits(values: Mapping[str, Any], exits: Mapping[str, str], source: str) -> None:
    trained = {name: values.get(name, default) for name, default in PABEE_EXITS.items()}
    if trained != dict(exits):
        raise InputError(
            f"{source} has trained exits with {_told(trained)}; they cannot go on with "
            f"{_told(exits)}"
        )


def _told(exits: Mapping[str, str]) -> str:
    return " and ".join(f"{name}={value}" for name, value in exits.items())


def _label_names(values: dict[str, Any], num_labels: int) -> tuple[str, ...]:
    if num_labels == 1:
        return ()
    names = values.get("id2label") or {}
    if len(names) != num_labels:
        return tuple(f"LABEL_{index}" for index in range(num_labels))
    return tuple(str(names.get(str(index), f"LABEL_{index}")) for index in range(num_labels))


def _max_length(tokenizer: Tokenizer, config: ModelConfig) -> int:
    told = tokenizer.model_max_length
    positions = config.max_position_embeddings
    return min(told, positions) if told < _UNKNOWN_LENGTH else positions
