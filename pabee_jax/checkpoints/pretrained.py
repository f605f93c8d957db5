"""Loading of a checkpoint directory: model, tokenizer, label names and criterion."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from pabee_jax import criteria
from pabee_jax.checkpoints.files import read_config_json, read_tensors, resolve
from pabee_jax.checkpoints.names import (
    CLASSIFIERS_NAMES,
    Tensors,
    canonical_name,
    classifiers_name,
    from_tensors,
    head_labels,
    log_report,
)
from pabee_jax.criteria import ExitCriterion
from pabee_jax.data.dataset import Dataset
from pabee_jax.data.tokenization import (
    TOKENIZER_FILES,
    Tokenizer,
    check_max_length,
    encode,
    load_tokenizer,
)
from pabee_jax.errors import InputError, is_unicode, shown
from pabee_jax.models.config import MOST_LABELS, PABEE_EXITS, ModelConfig
from pabee_jax.models.encoder import EarlyExitModel
from pabee_jax.models.families import FAMILIES, Family, family_of

# Values of `Pretrained.trained_exits`.
TRAINED_EXITS = ("all", "last", "none")
# A tokenizer's `model_max_length` from this value on means that the length is unknown.
_UNKNOWN_LENGTH = 1_000_000


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """The contents of a checkpoint directory.

    Attributes:
        model: the unstacked model, with parameters in float32.
        tokenizer: the Hugging Face tokenizer; None if the checkpoint has no tokenizer.
        hugging_face_config: the values of `config.json`.
        label_names: class names by class id; empty for regression.
        max_length: the number of tokens to which texts are truncated.
        criterion: the exit criterion in `config.json`; None if there is none.
        trained_exits: which exits were trained: "all", "last" (of an ordinary classifier, whose
            head is the last exit), or "none" (of an encoder).
        score_name: the name of the score of a regression.
    """

    model: EarlyExitModel
    tokenizer: Tokenizer | None
    hugging_face_config: dict[str, Any]
    label_names: tuple[str, ...]
    max_length: int
    criterion: ExitCriterion | None = None
    trained_exits: str = "none"
    score_name: str = "score"

    @property
    def output_names(self) -> tuple[str, ...]:
        """The names of the model's outputs: of the classes, or of the score of a regression."""
        return self.label_names or (self.score_name,)

    @property
    def family(self) -> Family:
        """The family of the model type in `config.json`."""
        config = self.model.config
        return family_of(self.hugging_face_config.get("model_type", config.family))

    @property
    def head_pooling(self) -> str:
        """What the classification head of an ordinary classifier reads: "cls" or "mean"."""
        return _head_pooling(self.hugging_face_config, self.family)

    def with_max_length(self, max_length: int) -> "Pretrained":
        """Return a copy that truncates texts to `max_length` tokens.

        Raises:
            InputError: `max_length` exceeds the model's number of positions, or leaves no room for
                a text.
        """
        positions = self.model.config.max_length
        if max_length > positions:
            raise InputError(
                f"max_seq_length is {max_length}, but the model has {positions} positions"
            )
        if self.tokenizer is not None:
            check_max_length(self.tokenizer, max_length, "max_seq_length")
        return dataclasses.replace(self, max_length=max_length)

    def check_criterion(self, criterion: ExitCriterion) -> None:
        """Raise InputError if a criterion does not fit the model, or uses an untrained exit."""
        config = self.model.config
        criteria.check(criterion, config.num_hidden_layers, config.num_labels, self.trained_exits)

    def require_tokenizer(self) -> Tokenizer:
        """Return the tokenizer.

        Raises:
            InputError: the checkpoint has no tokenizer.
        """
        if self.tokenizer is None:
            raise InputError(
                "the checkpoint has no tokenizer, which texts need: add its files (one of "
                f"{', '.join(TOKENIZER_FILES)}) to the checkpoint, or give tokenized rows to "
                "EarlyExitClassifier.predict"
            )
        return self.tokenizer

    def encode(
        self,
        texts: Sequence[str],
        pairs: Sequence[str | None] | None,
        *,
        truncate: bool = True,
        truncation_side: str | None = None,
    ) -> Dataset:
        """Return the token ids of texts or text pairs, truncated to `max_length` tokens.

        Args:
            texts: the first text of every row.
            pairs: as in `pabee_jax.data.tokenization.encode`.
            truncate: whether longer rows are truncated or refused.
            truncation_side: the end of the text that is cut, "left" or "right"; None for the
                tokenizer's own.

        Raises:
            TooManyTokens: a row is too long, and `truncate` is false.
            InputError: the model does not have a token id or a token type, the texts cannot be
                tokenized, or the checkpoint has no tokenizer.
        """
        dataset = encode(
            self.require_tokenizer(),
            texts,
            pairs,
            self.max_length,
            truncate=truncate,
            truncation_side=truncation_side,
        )
        if self.model.config.type_vocab_size < 2:  # Tokenizers may return types all the same.
            no_types = np.zeros_like(dataset.token_type_ids)
            dataset = dataclasses.replace(dataset, token_type_ids=no_types)
        highest_id, vocab_size = int(dataset.input_ids.max()), self.model.config.vocab_size
        if highest_id >= vocab_size:
            raise InputError(
                f"the tokenizer gives token id {highest_id}, but the model's vocabulary has "
                f"{vocab_size} tokens; use the tokenizer that belongs to the model"
            )
        highest_type, types = int(dataset.token_type_ids.max()), self.model.config.type_vocab_size
        if highest_type >= max(1, types):
            raise InputError(
                f"the tokenizer gives token type {highest_type}, but the model has {types} types; "
                "use the tokenizer that belongs to the model"
            )
        return dataset


def load_pretrained(
    path_or_hub_id: str | os.PathLike,
    *,
    revision: str | None = None,
    num_labels: int | None = None,
    dtype: str = "float32",
    seed: int = 0,
    exits: Mapping[str, str] | None = None,
    classifier_bias: np.ndarray | None = None,
) -> Pretrained:
    """Load a checkpoint from a directory (local or `gs://`) or from the hub.

    Args:
        path_or_hub_id: the directory or the hub id.
        revision: branch, tag or commit of a repository on the hub; None for its main branch.
        num_labels: required if the checkpoint has neither exits nor a classification head; 1 means
            regression.
        dtype: the compute dtype, "float32" or "bfloat16".
        seed: the seed for parameters that the checkpoint lacks (classifiers, pooler).
        exits: `exit_pooler` and `exit_pooling` of a model whose exits are not trained yet; the
            default is the values in `config.json` or, if it has none, PABEE's.
        classifier_bias: (C,) the initial bias of classifiers that the checkpoint lacks; 0 if None.

    Raises:
        InputError: the checkpoint cannot be reached, is damaged, is of a family that is not
            supported or for several labels per text, has a tensor of the wrong shape, has no
            classifiers while `num_labels` is None, or has trained exits that differ from `exits`.
    """
    directory, source = resolve(path_or_hub_id, revision), str(path_or_hub_id)
    values = read_config_json(directory)
    if num_labels is not None:
        _check_num_labels(num_labels)
    if not _is_whole(seed):
        raise InputError(f"seed is {shown(seed)}; it must be a whole number")
    _check_model_type(values, directory)
    tensors = read_tensors(directory)
    trained_name, trained_labels = _trained_classifiers(tensors)
    head = None if trained_labels or not _is_classifier(values) else _head(values, tensors, source)
    num_labels = num_labels or trained_labels or head
    if num_labels is None:
        raise InputError(
            f"{source} has no internal classifiers yet, and no classification head: give "
            "num_labels= to initialize them from scratch (1 means regression), or train them with "
            "pabee-jax train"
        )
    if exits is None and head is not None:
        # The exits that `attach` trains, so that the same program runs before and after.
        values.setdefault("exit_pooler", "per_exit")
        pooling = _head_pooling(values, family_of(values.get("model_type")))
        values.setdefault("exit_pooling", pooling)
    if exits is not None:
        if trained_labels is not None:
            _check_trained_exits(values, exits, source)
        values |= exits
    # transformers reads config.json too, and its error messages are unclear. The values are
    # therefore checked before transformers reads them here and for the tokenizer.
    label_names = _label_names(values, num_labels, source)
    score_name = _score_name(values, head is not None, source)
    trained_exits = _trained_exits(values, trained_labels is not None, head is not None, source)
    criterion = _criterion(values, source)
    config = ModelConfig.from_hugging_face(values, num_labels)
    expected_name = classifiers_name(config)
    if trained_name not in (None, expected_name):
        raise InputError(
            f"{source}: config.json describes exits with {describe_exits(config.exits)}, "
            f"whose parameters are {expected_name}.*, but the weights are {trained_name}.*"
        )
    tokenizer = load_tokenizer(directory)
    if tokenizer is None:
        logging.warning("%s has no tokenizer: it takes tokenized rows, but no texts", source)
    model, report = from_tensors(
        tensors,
        config,
        dtype=dtype,
        seed=seed,
        classifier_bias=classifier_bias,
        has_head=head is not None,
        source=source,
    )
    log_report(report, source)
    if trained_exits == "none" and exits is None:  # With `exits`, the caller trains them.
        logging.warning(
            "the exits of %s are not trained, so its predictions are random: train them with "
            "pabee-jax train",
            source,
        )
    return Pretrained(
        model=model,
        tokenizer=tokenizer,
        hugging_face_config=values,
        label_names=label_names,
        max_length=_max_length(tokenizer, config, source),
        criterion=criterion,
        trained_exits=trained_exits,
        score_name=score_name,
    )


def label_names_of(path_or_hub_id: str | os.PathLike) -> tuple[str, ...]:
    """Return the class names in the `config.json` of a classifier; empty for one score.

    Raises:
        InputError: the checkpoint cannot be reached, or its class names are unusable.
    """
    values = read_config_json(resolve(path_or_hub_id, None))
    # Hugging Face writes `id2label`; a configuration without it has two classes.
    num_labels = values.get("num_labels") or len(values.get("id2label") or (0, 1))
    _check_num_labels(num_labels)
    return _label_names(values, num_labels, str(path_or_hub_id))


def _check_model_type(values: Mapping[str, Any], directory: Path) -> None:
    """Raise InputError if `config.json` lacks the model type, which old programs did not write."""
    if values.get("model_type"):
        return
    architecture = "".join(map(str, values.get("architectures") or ()))
    likely = [
        name for name, family in FAMILIES.items() if architecture.startswith(family.class_prefix)
    ]
    raise InputError(
        f"{directory / 'config.json'} has no model_type: add the model's, as in "
        f'"model_type": "{likely[0] if likely else "bert"}"; supported are {", ".join(FAMILIES)}'
    )


def _trained_exits(
    values: Mapping[str, Any], has_classifiers: bool, has_head: bool, source: str
) -> str:
    """Return which exits were trained; `save_pretrained` writes the value unless it is "all"."""
    if not has_classifiers:
        return "last" if has_head else "none"
    trained = values.get("trained_exits", "all")
    if trained not in TRAINED_EXITS:
        raise InputError(
            f"{source}: trained_exits in config.json is {shown(trained)}; it must be one of "
            f"{', '.join(TRAINED_EXITS)}"
        )
    return trained


def _trained_classifiers(tensors: Tensors) -> tuple[str, int] | tuple[None, None]:
    """Return the name of a checkpoint's internal classifiers and their number of outputs.

    Both are None if the checkpoint has no internal classifiers.
    """
    for name, tensor in tensors.items():
        module, _, rest = canonical_name(name).partition(".")
        if module in CLASSIFIERS_NAMES and rest == "0.weight" and tensor.ndim:
            return module, tensor.shape[0]
    return None, None


def _is_classifier(values: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint's head, if it has one, classifies sequences.

    The heads of token classifiers and multiple choice have the same names.
    """
    architectures = values.get("architectures") or ["ForSequenceClassification"]
    return any(str(name).endswith("ForSequenceClassification") for name in architectures)


def _head(values: Mapping[str, Any], tensors: Tensors, source: str) -> int | None:
    """Return the number of labels of a checkpoint's classification head, or None without head."""
    labels = head_labels(tensors, family_of(values.get("model_type")).name)
    if labels is not None and values.get("problem_type") == "multi_label_classification":
        raise InputError(
            f"{source} is a classifier with several labels per text (problem_type is "
            "multi_label_classification); supported are one label per text and regression"
        )
    return labels


def _head_pooling(values: Mapping[str, Any], family: Family) -> str:
    # Only ModernBERT has the field; a configuration of another family may hold any field.
    return values.get("classifier_pooling", "cls") if len(family.head_poolings) > 1 else "cls"


def _check_trained_exits(values: Mapping[str, Any], exits: Mapping[str, str], source: str) -> None:
    trained = {name: values.get(name, default) for name, default in PABEE_EXITS.items()}
    if trained != dict(exits):
        raise InputError(
            f"{source} has trained exits with {describe_exits(trained)}; they cannot be loaded "
            f"with {describe_exits(exits)}"
        )


def describe_exits(exits: Mapping[str, str]) -> str:
    """Return the settings of exits for a message."""
    return " and ".join(f"{name}={value}" for name, value in exits.items())


def _check_num_labels(num_labels: Any) -> None:
    if not _is_whole(num_labels) or not 1 <= num_labels <= MOST_LABELS:
        raise InputError(
            f"num_labels is {shown(num_labels)}; it must be a whole number from 1 to {MOST_LABELS}"
        )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _criterion(values: Mapping[str, Any], source: str) -> ExitCriterion | None:
    early_exit = values.get("early_exit")
    if early_exit is None:
        return None
    try:
        return criteria.from_config(early_exit)
    except InputError as error:
        raise InputError(f"{source}: early_exit in config.json: {error}") from None


def _label_names(values: Mapping[str, Any], num_labels: int, source: str) -> tuple[str, ...]:
    """Return the class names in `id2label`, or "LABEL_0", ... if it has another number of names."""
    names = values.get("id2label")
    is_valid = isinstance(names, dict) and all(re.fullmatch("[0-9]{1,9}", key) for key in names)
    if names is not None and not is_valid:
        raise InputError(
            f"{source}: id2label in config.json is {shown(names)}; it must map class ids to names"
        )
    if num_labels == 1:
        return ()
    if not names or len(names) != num_labels:
        return tuple(f"LABEL_{index}" for index in range(num_labels))
    label_names = tuple(_label_name(names, index, source) for index in range(num_labels))
    for index, name in enumerate(label_names):
        if (first := label_names.index(name)) < index:
            raise InputError(
                f"{source}: id2label in config.json gives classes {first} and {index} the same "
                f"name, {shown(name)}; give every class its own name"
            )
    return label_names


def _score_name(values: Mapping[str, Any], has_head: bool, source: str) -> str:
    """Return the one name in `id2label`, or the name that Hugging Face gives a head without one."""
    names = values.get("id2label")
    if names and len(names) == 1:
        return _label_name(names, 0, source)
    return "LABEL_0" if has_head else "score"


def _label_name(names: Mapping[str, Any], index: int, source: str) -> str:
    if str(index) not in names:
        raise InputError(
            f"{source}: id2label in config.json has {len(names)} names, but not of class {index}"
        )
    name = names[str(index)]
    if not isinstance(name, str | int | float) or not is_unicode(str(name)):
        raise InputError(
            f"{source}: id2label in config.json names class {index} {shown(name)}; the name must "
            "be a string"
        )
    return str(name)


def _max_length(tokenizer: Tokenizer | None, config: ModelConfig, source: str) -> int:
    if tokenizer is None:
        return config.max_length
    length, positions = tokenizer.model_max_length, config.max_length
    is_number = isinstance(length, int | float) and not isinstance(length, bool)
    if is_number and length >= _UNKNOWN_LENGTH:
        length = positions
    if not is_number or not float(length).is_integer():
        raise InputError(
            f"{source}: model_max_length in tokenizer_config.json is {shown(length)}; it must be "
            "a whole number"
        )
    name = "model_max_length" if length < positions else "max_position_embeddings"
    max_length = min(int(length), positions)
    check_max_length(tokenizer, max_length, f"{source}: {name}")
    return max_length
