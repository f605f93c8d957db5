"""Encoder configuration: one dataclass for the configurations of all families."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any

from pabee_jax.errors import InputError, shown
from pabee_jax.models.activations import ACTIVATIONS
from pabee_jax.models.families import FAMILIES, LayerKinds, family_of

# The values of each exit setting; the first value is PABEE's.
EXIT_CHOICES = {"exit_pooler": ("shared", "per_exit"), "exit_pooling": ("cls", "mean")}
# The highest valid value of each size; the lowest is 1. An int32 indexes the rows of a parameter,
# and building a model takes time for every layer, before any tensor can contradict the number.
_HIGHEST_INDEX = 2**31 - 1
_MOST_LAYERS = 1000
MOST_LABELS = 1_000_000
_SIZES = {
    "vocab_size": _HIGHEST_INDEX,
    "embedding_size": _HIGHEST_INDEX,
    "hidden_size": _HIGHEST_INDEX,
    "num_hidden_layers": _MOST_LAYERS,
    "num_hidden_groups": _MOST_LAYERS,
    "inner_group_num": _MOST_LAYERS,
    "num_attention_heads": _HIGHEST_INDEX,
    "intermediate_size": _HIGHEST_INDEX,
    "max_position_embeddings": _HIGHEST_INDEX,
    "type_vocab_size": _HIGHEST_INDEX,
    "num_labels": MOST_LABELS,
}
# The condition that a number must satisfy, and its description.
_RATE = (lambda value: 0 <= value < 1), "a number from 0 to below 1"
_NUMBERS = {
    "layer_norm_eps": ((lambda value: 0 < value < 1), "a number above 0 and below 1"),
    "hidden_dropout_prob": _RATE,
    "attention_probs_dropout_prob": _RATE,
    "classifier_dropout_prob": _RATE,
    "exit_dropout_prob": _RATE,
    "initializer_range": ((lambda value: 0 <= value < math.inf), "a number from 0"),
}
# The families that PyTorch PABEE has.
PABEE_FAMILIES = ("bert", "albert")
PABEE_EXITS = {name: choices[0] for name, choices in EXIT_CHOICES.items()}


def exit_modules(exit_pooler: str) -> tuple[str, ...]:
    """Return the names of the modules whose parameters have a leading exit axis."""
    return ("classifiers", "pooler") if exit_pooler == "per_exit" else ("classifiers",)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture of an early-exit encoder.

    Fields that are not listed below have the name and meaning of the field in Hugging Face's
    configuration. BERT is the case `num_hidden_groups == num_hidden_layers`,
    `inner_group_num == 1` and `embedding_size == hidden_size`.

    Attributes:
        family: the name of a `Family` (`models/families.py`).
        num_labels: output size C of every internal classifier; 1 means regression.
        exit_pooler: "shared" for one pooler that all exits use (PABEE), or "per_exit" for one
            pooler per exit (DeeBERT).
        exit_pooling: "cls" if an exit reads the hidden state of the first token (PABEE), or "mean"
            if an exit reads the mean over the tokens in the attention mask
            (sentence-transformers).
        exit_dropout_prob: dropout rate before the classifiers, in training only. The value is
            `hidden_dropout_prob` for BERT and `classifier_dropout_prob` for ALBERT (as in the
            reference implementation, which ignores the newer `classifier_dropout`), and that of
            Hugging Face's classification head for other families.
        type_vocab_size: 0 if the family has no token types.
        position_offset: the index of a row's first token in the position embeddings.
        exit_act: the activation of the pooler.
        relative_buckets: the number of buckets of relative positions, each with a bias of the
            attention scores; 0 if the family has no such bias.
        layer_kinds: how layers differ from each other; None if they do not.
    """

    family: str
    vocab_size: int
    embedding_size: int
    hidden_size: int
    num_hidden_layers: int
    num_hidden_groups: int
    inner_group_num: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float
    exit_dropout_prob: float
    initializer_range: float
    num_labels: int
    exit_pooler: str = "shared"
    exit_pooling: str = "cls"
    position_offset: int = 0
    exit_act: str = "tanh"
    relative_buckets: int = 0
    layer_kinds: LayerKinds | None = None

    def __post_init__(self):
        if self.family not in {family.name for family in FAMILIES.values()}:
            raise InputError(f"unknown family {shown(self.family)}")
        for name in ("hidden_act", "exit_act"):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in ACTIVATIONS:
                raise InputError(
                    f"{name} {shown(value)} is not one of {', '.join(sorted(ACTIVATIONS))}"
                )
        for name, choices in EXIT_CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(
                    f"{name} is {shown(getattr(self, name))}; it must be one of "
                    f"{', '.join(choices)}"
                )
        for name, value in vars(self).items():
            if value or name != "type_vocab_size":
                _check_number(name, value, name)
        if self.max_length < 1:
            raise InputError(
                f"config.json: max_position_embeddings is {self.max_position_embeddings}; it must "
                f"be at least {self.position_offset + 1}, because positions start after the "
                "padding id"
            )
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )

    @property
    def is_regression(self) -> bool:
        return self.num_labels == 1

    @property
    def max_length(self) -> int:
        """The most tokens of a row."""
        return self.max_position_embeddings - self.position_offset

    @property
    def has_position_embeddings(self) -> bool:
        """Whether the embeddings depend on positions; rotary positions do not."""
        return self.layer_kinds is None

    @property
    def has_projection(self) -> bool:
        """Whether embeddings are projected to the hidden size; ALBERT's always are."""
        return self.family == "albert" or self.embedding_size != self.hidden_size

    @property
    def is_pre_norm(self) -> bool:
        """Whether LayerNorm comes before attention and feed-forward block instead of after them."""
        return self.family == "modernbert"

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward block is gated."""
        return self.family == "modernbert"

    @property
    def has_biases(self) -> bool:
        """Whether the encoder's linear maps and LayerNorms have biases."""
        return self.family != "modernbert"

    @property
    def exits(self) -> dict[str, str]:
        """The exit settings by their names in `config.json`."""
        return {name: getattr(self, name) for name in EXIT_CHOICES}

    @property
    def is_pabee(self) -> bool:
        """Whether PyTorch PABEE can run the model.

        PyTorch PABEE's exits share one pooler that reads the first token.
        """
        return self.family in PABEE_FAMILIES and self.exits == PABEE_EXITS

    def group(self, layer: int) -> int:
        """Return the parameter group of layer `layer` (from 0).

        The division is in floating point, as in Hugging Face's ALBERT.
        """
        return int(layer / (self.num_hidden_layers / self.num_hidden_groups))

    @property
    def layer_groups(self) -> tuple[int, ...]:
        """The parameter group of every layer."""
        return tuple(self.group(layer) for layer in range(self.num_hidden_layers))

    @classmethod
    def from_hugging_face(cls, values: Mapping[str, Any], num_labels: int) -> "ModelConfig":
        """Return the configuration for the values of a `config.json`.

        Absent fields take Hugging Face's defaults.

        Raises:
            InputError: the model type is not supported, the model is a decoder, its position
                embeddings are not absolute, or a value is unusable.
        """
        model_type = values.get("model_type", "")
        family = family_of(model_type)
        if values.get("position_embedding_type", "absolute") != "absolute":
            raise InputError("only absolute position embeddings are supported")
        for name in ("is_decoder", "add_cross_attention"):
            if values.get(name):
                raise InputError(f"config.json: {name} is true; only encoders are supported")
        import transformers  # Imported here because the import takes seconds.

        # transformers accepts sizes that no model can have, and names its own classes in errors.
        known = vars(transformers.AutoConfig.for_model(model_type))
        own_names = {original: name for name, original in family.names.items()}
        for original, value in values.items():
            if original in known:
                _check_number(own_names.get(original, original), value, original)
        try:
            full = transformers.AutoConfig.for_model(**{**values, "model_type": model_type})
            fields = {}
            for name, field_type in typing.get_type_hints(cls).items():
                original = family.names.get(name, name)
                if original in known or (name in EXIT_CHOICES and name in values):
                    fields[name] = field_type(getattr(full, original))  # JSON may have 0 for 0.0.
        except Exception as error:  # transformers' checks have no common exception class.
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise InputError(f"config.json holds an unusable value: {reason}") from None
        fields |= family.derive(full) | {"family": family.name, "num_labels": num_labels}
        return cls(**fields)


def _check_number(name: str, value: Any, original_name: str) -> None:
    """Raise InputError if a size, a rate or another number has a value that no model can have.

    Args:
        name: the name of a field of `ModelConfig`; fields that are not numbers are valid.
        value: its value.
        original_name: its name in `config.json`.
    """
    if name in _SIZES:
        is_valid = isinstance(value, int) and 1 <= value <= _SIZES[name]
        required = f"a whole number from 1 to {_SIZES[name]}"
    elif name in _NUMBERS:
        condition, required = _NUMBERS[name]
        is_valid = isinstance(value, int | float) and condition(value)
    else:
        return
    if not is_valid or isinstance(value, bool):
        raise InputError(f"config.json: {original_name} is {shown(value)}; it must be {required}")
