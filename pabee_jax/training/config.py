"""The configuration of a training run, as typed dataclasses."""

import dataclasses
import math
from typing import Any

from pabee_jax.data.config import DataConfig
from pabee_jax.data.config import FilesConfig as FilesConfig  # For configurations of the user.
from pabee_jax.errors import InputError, shown
from pabee_jax.io import storage
from pabee_jax.models.config import EXIT_CHOICES

# Fields that hold paths; the paths may differ between the processes of a run.
PLACES = ("model", "data_dir", "files.train", "files.dev", "files.test")

# The strategies whose first phase trains only the last exit.
TWO_PHASES = ("two_stage", "last_first")


@dataclasses.dataclass
class ScratchConfig:
    """The small ALBERT that the demo trains from scratch if `model` is empty.

    Attributes:
        num_hidden_layers: layers, from 1 to 1,000.
        embedding_size: size of the word embeddings, at least 1.
        hidden_size: size of the hidden states, at least 1.
        num_attention_heads: attention heads, at least 1.
        intermediate_size: size of the feed-forward layer, at least 1.
        dropout: rate of every dropout, from 0 to below 1.
        initializer_range: standard deviation of the initial weights. Narrow layers need more than
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
    """The device mesh, with the axes "data" and "model".

    Attributes:
        data: devices over which a batch is sharded; -1 means all devices divided by `model`.
        model: devices over which attention heads, feed-forward features and embedding features
            are sharded.
        shard_parameters: shard matrices and their optimizer state over the data axis as well. A
            device then needs less memory, and the devices communicate more.
    """

    data: int = -1
    model: int = 1
    shard_parameters: bool = False


@dataclasses.dataclass
class LossConfig:
    """The weights of the exits' losses in the joint loss.

    Attributes:
        weights: "linear" (exit i has weight i, as in PABEE), "uniform", or "last" (only the last
            exit is trained).
    """

    weights: str = "linear"


@dataclasses.dataclass
class SampleWeightsConfig:
    """Loss weights per row: an exit weights the rows that are likely to exit there (COSEE).

    For classification only. In every step, early exit is simulated with random thresholds on
    `signal`. The weight of a row's loss at an exit falls exponentially with the distance to the
    layer at which the row exits. These weights replace `loss.weights`.

    Attributes:
        decay: the rate, at least 0, at which the weights fall with the distance in layers; it rises
            linearly from 0 over the run. 0 switches the weights off.
        thresholds: the number of simulated thresholds per step.
        signal: the difficulty of a row that the thresholds compare: "energy" (COSEE),
            "max_probability" or "entropy".
        calibration: the weight, at least 0, of a loss that separates the signals of the rows which
            an exit classifies correctly from those of the other rows.
        margin: the distance, at least 0, between the two means at which the calibration loss is 0.
    """

    decay: float = 0.0
    thresholds: int = 5
    signal: str = "energy"
    calibration: float = 0.0
    margin: float = 0.3


@dataclasses.dataclass
class SecondPhaseConfig:
    """The learning rate of the second phase of a strategy with two phases.

    Attributes:
        learning_rate: peak learning rate of the second phase: with "two_stage" that of the early
            exits, which the phase trains alone; with "last_first" that of the encoder, and of the
            exits unless `TrainConfig.exit_learning_rate` is given. If it is given, each phase has a
            learning-rate schedule of its own, which ends at 0. 0: one schedule over the whole run.
        warmup_steps: steps, fewer than those of the phase, over which the learning rate of the
            second phase rises linearly from 0.
    """

    learning_rate: float = 0.0
    warmup_steps: int = 0


@dataclasses.dataclass
class DistillConfig:
    """Distillation of the last exit into the early exits (FastBERT, BERxiT).

    Attributes:
        weight: weight of the distillation loss, at least 0, added to the loss of each early exit
            on the labels; 0 switches distillation off.
        temperature: divisor, above 0, of the logits of both exits before the softmax;
            classification only.
    """

    weight: float = 0.0
    temperature: float = 1.0


@dataclasses.dataclass
class TrainConfig(DataConfig):
    """The configuration of one training run.

    Attributes:
        task, data_dir, files: see `DataConfig`.
        model: hub id, directory or `gs://` address of the encoder; if empty, the demo trains the
            encoder from scratch.
        scratch: see `ScratchConfig`; without effect if `model` is given.
        max_seq_length: sequence length in tokens, at least 8; longer texts are truncated.
        batch_size: rows per step, summed over all devices.
        gradient_accumulation: number of microbatches per step. The microbatches run one after
            another, which needs less memory. The loss is the mean over the whole batch.
        rematerialize: recompute each layer in the backward pass from the layer's input. Matrix
            products and dropout masks are then not stored, which needs less memory and about a
            third more time. (Cheap operations, such as activations and LayerNorm, are always
            recomputed.)
        learning_rate: peak learning rate; it falls linearly to 0 at the last step.
        exit_learning_rate: peak learning rate of the exits' own parameters (the classifiers and,
            with pooler="per_exit", the poolers), in every phase except the second phase of
            "two_stage" with `second_phase.learning_rate`. 0 means the learning rate of the encoder.
        num_epochs: passes over the training rows, if `max_steps` is 0; fractions are allowed.
        max_steps: optimizer steps; 0 derives the number of steps from `num_epochs`.
        warmup_steps: steps, fewer than those of the run, over which the learning rate rises
            linearly from 0.
        weight_decay: weight decay of AdamW; biases and LayerNorm parameters are exempt.
        adam_epsilon: epsilon of AdamW.
        max_grad_norm: global norm to which gradients are clipped; 0 switches clipping off.
        seed: seed of the data order, the dropout and the new parameters, from 0 to 2^31 - 1.
        dtype: compute type, "float32" or "bfloat16"; parameters and reductions stay float32.
        eval_every: steps between evaluations on dev; 0 evaluates after every epoch.
        save_every: steps between checkpoints; 0 saves at every evaluation.
        export: parameters in the finished run directory: "last" (of the last step), or "best" (of
            the step with the best score on dev).
        mesh: see `MeshConfig`.
        loss: see `LossConfig`.
        strategy: which exits are trained in which steps. "joint": all exits in all steps (PABEE).
            "two_stage": first the last exit with the encoder, then the early exits with all other
            parameters frozen (DeeBERT). "attach": the early exits of a trained classifier, with all
            other parameters frozen as they are in `model`. "alternating": the last exit alone in
            odd steps (counted from 1), all exits in even steps (BERxiT). "last_first": first the
            last exit alone, then all exits.
        last_exit_share: fraction of the steps, between 0 and 1, that train the last exit alone;
            for "two_stage" and "last_first".
        second_phase: see `SecondPhaseConfig`; for "two_stage" and "last_first".
        sample_weights: see `SampleWeightsConfig`.
        gradient: how the gradients of early exits enter the encoder. "full": unscaled.
            "equilibrium": every layer receives the mean, not the sum, of the gradients of the
            exits above (ElasticBERT); AdamW undoes this scaling where layers do not share
            parameters (docs/training-exits.md). "scaled": multiplied by `gradient_scale`.
        gradient_scale: factor from 0 (early exits do not train the encoder) to 1, for "scaled".
        distill: see `DistillConfig`.
        pooler: "shared" (one pooler for all exits, as in PABEE) or "per_exit" (DeeBERT).
        pooling: input of an exit: "cls" (the first token, as in PABEE), or "mean" (the mean over
            all tokens without padding).
        classifier_bias: initial bias of new classifiers: "zero", or "prior" (the mean score of the
            training rows, or the logarithms of their class frequencies).
        order: order of the training rows: "shuffled", or "length_grouped" (rows of similar length
            share a batch, so that batches have less padding).
    """

    model: str = ""
    scratch: ScratchConfig = dataclasses.field(default_factory=ScratchConfig)
    max_seq_length: int = 128
    batch_size: int = 32
    gradient_accumulation: int = 1
    rematerialize: bool = False
    learning_rate: float = 2e-5
    exit_learning_rate: float = 0.0
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
    second_phase: SecondPhaseConfig = dataclasses.field(default_factory=SecondPhaseConfig)
    sample_weights: SampleWeightsConfig = dataclasses.field(default_factory=SampleWeightsConfig)
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
    "strategy": ("joint", "two_stage", "alternating", "last_first", "attach"),
    "gradient": ("full", "equilibrium", "scaled"),
    "sample_weights.signal": ("energy", "max_probability", "entropy"),
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
    "exit_learning_rate": 0,
    "second_phase.learning_rate": 0,
    "second_phase.warmup_steps": 0,
    "sample_weights.decay": 0,
    "sample_weights.thresholds": 1,
    "sample_weights.calibration": 0,
    "sample_weights.margin": 0,
    "scratch.num_hidden_layers": 1,
    "scratch.embedding_size": 1,
    "scratch.hidden_size": 1,
    "scratch.num_attention_heads": 1,
    "scratch.intermediate_size": 1,
}
# Steps, seeds and sizes must fit into int32.
LARGEST_INTEGER = 2**31 - 1
# The deepest encoders have a few hundred layers. With more layers, the table of patience settings
# at the end of a run would take longer than the run.
_AT_MOST = {"scratch.num_hidden_layers": 1_000}
_POSITIVE = (
    "learning_rate",
    "adam_epsilon",
    "num_epochs",
    "distill.temperature",
    "scratch.initializer_range",
)
# More bytes than the longest path and the longest name of a column.
_LONGEST_TEXT = 4_096


def recommend(config: TrainConfig) -> None:
    """Set the exits and the loss that docs/training-exits.md recommends."""
    config.pooling = "mean"
    config.pooler = "per_exit"
    config.classifier_bias = "prior"
    config.exit_learning_rate = 1e-3
    config.loss.weights = "uniform"
    config.distill.weight = 1.0


def changed(config: TrainConfig) -> dict[str, Any]:
    """Return the settings, by name, whose value is not the default."""
    defaults = leaves(TrainConfig())
    return {name: value for name, value in leaves(config).items() if value != defaults[name]}


def check(config: TrainConfig) -> None:
    """Raise InputError for the first invalid value of `config`, whatever the other values are."""
    check_types(config)
    values = leaves(config)
    for name, choices in _CHOICES.items():
        if values[name] not in choices:
            raise InputError(
                f"config.{name} is {shown(values[name])}; it must be one of {', '.join(choices)}"
            )
    rate, scale, share = config.scratch.dropout, config.gradient_scale, config.last_exit_share
    if not 0 <= rate < 1:
        raise InputError(f"config.scratch.dropout is {shown(rate)}; it must be from 0 to below 1")
    if not 0 <= scale <= 1:
        raise InputError(f"config.gradient_scale is {shown(scale)}; it must be from 0 to 1")
    if not 0 < share < 1:
        raise InputError(f"config.last_exit_share is {shown(share)}; it must be between 0 and 1")
    for name, value in values.items():
        if isinstance(value, str):
            _check_text(name, value)
        elif name in _AT_LEAST and not value >= _AT_LEAST[name]:
            raise InputError(
                f"config.{name} is {shown(value)}; it must be at least {_AT_LEAST[name]}"
            )
        elif value > (largest := _AT_MOST.get(name, LARGEST_INTEGER)) and isinstance(value, int):
            raise InputError(f"config.{name} is {shown(value)}; it must be at most {largest}")
        elif name in _POSITIVE and not 0 < value < math.inf:
            raise InputError(f"config.{name} is {shown(value)}; it must be a positive number")
        elif isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"config.{name} is {shown(value)}; it must be a finite number")


def check_types(config: Any) -> None:
    """Raise InputError unless every field has the type of its default, and no field is new."""
    if not isinstance(config, TrainConfig):
        raise InputError(f"the config is {type(config).__name__}; it must be a TrainConfig")
    values, defaults = leaves(config), leaves(TrainConfig())
    for name, value in values.items():
        # An assignment to a misspelled field, `config.batchsize = 8`, creates an attribute. A
        # value in place of a group, `config.loss = "last"`, has the name of the group.
        if name not in defaults:
            raise InputError(f"config.{name} does not exist as a single setting of a TrainConfig")
        expected = type(defaults[name])
        allowed = (int, float) if expected is float else expected
        # Python's booleans are integers.
        if not isinstance(value, allowed) or (isinstance(value, bool) and expected is not bool):
            raise InputError(
                f"config.{name} is {shown(value)}; it must be of type {expected.__name__}"
            )
    for name in defaults.keys() - values.keys():
        raise InputError(f"config.{name} is missing")


def _check_text(name: str, text: str) -> None:
    problem = storage.unusable_text(text)
    if problem is None and len(text.encode()) > _LONGEST_TEXT:
        problem = f"has more than {_LONGEST_TEXT} bytes"
    if problem:
        raise InputError(f"config.{name} is {shown(text)}, which {problem}")


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of all fields at any depth by name, such as "loss.weights"."""
    result = {}
    for name, value in vars(config).items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            result |= leaves(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = value
    return result
