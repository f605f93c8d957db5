"""Everything a training run can be told, as one typed dataclass."""

import dataclasses
from typing import Any

from pabee_jax.data.config import DataConfig
from pabee_jax.errors import InputError
from pabee_jax.models.config import EXIT_CHOICES

# Fields that say where on a machine something is; each process of a run may have its own copies.
PLACES = ("model", "data_dir", "files.train", "files.dev", "files.test")


@dataclasses.dataclass
class ScratchConfig:
    """The small ALBERT that is trained from scratch when `model` is empty (the demo).

    Attributes:
        dropout: rate of all its dropouts.
        initializer_range: standard deviation of its initial weights. Narrow layers need more than
            the usual 0.02 to start learning.
    """

    num_hidden_layers: int = 6
    embedding_size: int = 64
    hidden_size: int = 64
    num_attention_heads: int = 4
    intermediate_size: int = 128
    dropout: float = 0.0
    initializer_range: float = 0.06


@dataclasses.dataclass
class MeshConfig:
    """Attributes:
    data: devices over which a batch is split; -1 takes all that `model` leaves.
    model: devices over which attention heads, feed-forward and embedding features are split.
    shard_parameters: split matrices and their optimiser state over the data axis as well: less
        memory per device, more communication.
    """

    data: int = -1
    model: int = 1
    shard_parameters: bool = False


@dataclasses.dataclass
class LossConfig:
    """Attributes:
    weights: "linear" (exit i counts i times: the paper), "uniform", or "last" (only the last).
    """

    weights: str = "linear"


@dataclasses.dataclass
class DistillConfig:
    """What the early exits learn from the last one beside the labels (FastBERT, BERxiT).

    Attributes:
        weight: of the distillation in each early exit's loss; 0 switches it off.
        temperature: softens both predictions; classification only.
    """

    weight: float = 0.0
    temperature: float = 1.0


@dataclasses.dataclass
class TrainConfig(DataConfig):
    """One training run.

    Attributes:
        task, data_dir, files: see `DataConfig`.
        model: hub id, directory or `gs://` address of the encoder; empty: from scratch.
        scratch, mesh, loss, distill: see their classes.
        strategy: which exits learn when: "joint", all of them always (PABEE); "two_stage", first
            the last exit with the encoder, then the others with all else frozen (DeeBERT);
            "alternating", odd steps the last exit alone and even steps all (BERxiT); "last_first",
            first the last exit alone, then all.
        last_exit_share: of the steps, for "two_stage" and "last_first": how many train the last
            exit alone.
        gradient: how much of an early exit's gradient enters the encoder: "full"; "equilibrium",
            every layer gets the mean over the exits above it instead of their sum (ElasticBERT),
            which AdamW undoes where layers do not share parameters: docs/training-exits.md;
            "scaled", multiplied by `gradient_scale`.
        gradient_scale: from 0 (early exits read a detached encoder) to 1, for "scaled".
        pooler: "shared" by all exits (PABEE), or one "per_exit" (DeeBERT).
        pooling: what an exit reads: "cls", the first token (PABEE), or the "mean" over the tokens.
        classifier_bias: where new classifiers start: at "zero", or at the "prior": the training
            rows' mean score, or the logarithms of their class frequencies.
        order: of the training rows: "shuffled", or "length_grouped": rows of similar length share a
            batch, so that less of it is padding.
        max_seq_length: in tokens; longer texts are cut.
        batch_size: rows per step, over all devices together.
        gradient_accumulation: microbatches into which a step's batch is cut; they run one after
            another, for less memory. The loss stays the mean over the whole batch.
        rematerialize: in the backward pass, compute each layer once more from its input instead of
            keeping its matrix products and dropout masks: less memory, about a third more time.
            (What is cheap, as activations and LayerNorm, is always computed once more.)
        learning_rate: its peak; it falls linearly to 0 at the last step.
        num_epochs: passes over the training rows; a fraction is fine.
        max_steps: optimiser steps; 0 derives them from `num_epochs`.
        warmup_steps: steps over which the learning rate rises linearly from 0.
        weight_decay: AdamW's; biases and LayerNorm parameters are exempt.
        adam_epsilon: AdamW's epsilon.
        max_grad_norm: global norm to which gradients are clipped; 0 switches clipping off.
        seed: of the data order, the dropout and the new parameters.
        dtype: compute type, "float32" or "bfloat16"; parameters and reductions stay float32.
        eval_every: steps between evaluations on dev; 0 means every epoch.
        save_every: steps between checkpoints; 0 means at every evaluation.
        export: which parameters the finished run directory holds: "last", or "best" on dev.
    """

    model: str = ""
    scratch: ScratchConfig = dataclasses.field(default_factory=ScratchConfig)
    max_seq_length: int = 128
    batch_size: int = 32
    gradient_accumulation: int = 1
    rematerialize: bool = False
    learning_rate: float = 2e-5
    num_epochs: float = 5.0
    max_steps: int = 0
    warmup_steps: int = 0
    weight_decay: float = 0.0
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    seed: int = 0
    dtype: str = "float32"
    eval_every: int = 0
    save_every: int = 0
    export: str = "last"
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    strategy: str = "joint"
    last_exit_share: float = 0.5
    gradient: str = "full"
    gradient_scale: float = 1.0
    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)
    pooler: str = "shared"
    pooling: str = "cls"
    classifier_bias: str = "zero"
    order: str = "shuffled"


_CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "export": ("last", "best"),
    "loss.weights": ("linear", "uniform", "last"),
    "strategy": ("joint", "two_stage", "alternating", "last_first"),
    "gradient": ("full", "equilibrium", "scaled"),
    "pooler": EXIT_CHOICES["exit_pooler"],
    "pooling": EXIT_CHOICES["exit_pooling"],
    "classifier_bias": ("zero", "prior"),
    "order": ("shuffled", "length_grouped"),
}
_AT_LEAST = {
    "max_seq_length": 8,
    "batch_size": 1,
    "gradient_accumulation": 1,
    "max_steps": 0,
    "warmup_steps": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "eval_every": 0,
    "save_every": 0,
    "seed": 0,
    "distill.weight": 0,
    "scratch.num_hidden_layers": 1,
    "scratch.embedding_size": 1,
    "scratch.hidden_size": 1,
    "scratch.num_attention_heads": 1,
    "scratch.intermediate_size": 1,
}
_LARGEST_SEED = 2**31 - 1


def check(config: TrainConfig) -> None:
    """Raises InputError for the first value that no run could use."""
    for name, choices in _CHOICES.items():
        value = _get(config, name)
        if value not in choices:
            raise InputError(f"config.{name} is {value!r}; it must be one of {', '.join(choices)}")
    for name, least in _AT_LEAST.items():
        value = _get(config, name)
        if not value >= least:
            raise InputError(f"config.{name} is {value}; it must be at least {least}")
    if config.seed > _LARGEST_SEED:
        raise InputError(f"config.seed is {config.seed}; it must be at most {_LARGEST_SEED}")
    rate = config.scratch.dropout
    if not 0 <= rate < 1:
        raise InputError(f"config.scratch.dropout is {rate}; it must be from 0 to below 1")
    if not 0 <= config.gradient_scale <= 1:
        raise InputError(f"config.gradient_scale is {config.gradient_scale}; it must be 0 to 1")
    if not 0 < config.last_exit_share < 1:
        raise InputError(
            f"config.last_exit_share is {config.last_exit_share}; it must be between 0 and 1"
        )
    for name in ("learning_rate", "adam_epsilon", "num_epochs", "distill.temperature"):
        value = _get(config, name)
        if not 0 < value < float("inf"):
            raise InputError(f"config.{name} is {value}; it must be a positive number")
    _refuse_settings_without_effect(config)


def _refuse_settings_without_effect(config: TrainConfig) -> None:
    """A setting that cannot change the run was surely meant otherwise."""
    if config.loss.weights == "last":
        reason = "with config.loss.weights=last no early exit is trained"
        refuse_changed(config, ("strategy", "gradient", "distill.weight", "pooler"), reason)
    if config.strategy == "two_stage":
        reason = "with config.strategy=two_stage early exits never change the encoder"
        refuse_changed(config, ("gradient",), reason)
    if config.strategy not in ("two_stage", "last_first"):
        reason = "it is for config.strategy two_stage and last_first"
        refuse_changed(config, ("last_exit_share",), reason)
    if config.gradient == "scaled" and config.gradient_scale == 1:
        raise InputError("config.gradient_scale is 1, which scales nothing; give one below 1")
    if config.gradient != "scaled":
        refuse_changed(config, ("gradient_scale",), "it is for config.gradient=scaled")
    if not config.distill.weight:
        refuse_changed(config, ("distill.temperature",), "config.distill.weight is 0")


def refuse_changed(config: TrainConfig, names: tuple[str, ...], reason: str) -> None:
    """Raises InputError for the first of these settings that is not its default."""
    default = TrainConfig()
    for name in names:
        if _get(config, name) != _get(default, name):
            raise InputError(f"config.{name} is {_get(config, name)!r}, but {reason}")


def _get(config: TrainConfig, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config
