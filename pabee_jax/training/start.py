"""The start of a run: the rows, and the model before the first step."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx, traverse_util
from jax.sharding import Mesh

from pabee_jax.checkpoints.pretrained import Pretrained, label_names_of, load_pretrained
from pabee_jax.criteria import Patience
from pabee_jax.data import demo
from pabee_jax.data.batching import training_lengths
from pabee_jax.data.dataset import Dataset
from pabee_jax.data.labels import are_numbered
from pabee_jax.data.load import other_classes
from pabee_jax.data.task import Examples, Task
from pabee_jax.distributed import processes, sharding
from pabee_jax.errors import InputError
from pabee_jax.inference.classifier import EarlyExitClassifier
from pabee_jax.models.config import ModelConfig
from pabee_jax.models.encoder import EarlyExitModel
from pabee_jax.models.parameters import split
from pabee_jax.training import memory
from pabee_jax.training.config import PLACES, TrainConfig
from pabee_jax.training.effects import refuse_changed


def labeled_examples(task: Task, split: str) -> Mapping[str, Examples]:
    """Return the parts of a split.

    Raises:
        InputError: a part has no labels.
    """
    parts = task.read(split)
    for name, examples in parts.items():
        if examples.labels is None:
            raise InputError(f"the {name} rows of task {task.name} have no labels")
    return parts


def examples_of(config: TrainConfig, task: Task, split: str) -> Mapping[str, Examples]:
    """Return the parts of a split; only strategy "attach" takes rows without labels.

    Raises:
        InputError: a part has no labels, and the run needs labels.
    """
    if config.strategy != "attach":
        return labeled_examples(task, split)
    parts = task.read(split)
    if config.classifier_bias == "prior" and any(part.labels is None for part in parts.values()):
        raise InputError(
            f"config.classifier_bias is 'prior', but the {split} rows of task {task.name} have no "
            "labels"
        )
    return parts


def classifier_label_names(config: TrainConfig) -> tuple[str, ...]:
    """Return the names of the outputs of the classifier from which a run starts.

    For a plain encoder, these are the names that its `config.json` gives.
    """
    return label_names_of(config.model) if config.model else ()


def with_answers(parts: Mapping[str, Dataset], start: Pretrained) -> Mapping[str, Dataset]:
    """Return the parts of a split; without labels, with the predictions at full depth."""
    if all(dataset.labels is not None for dataset in parts.values()):
        return parts
    classifier = EarlyExitClassifier(start, criterion=Patience(0))
    return {
        name: dataclasses.replace(dataset, labels=classifier.predict(dataset).labels)
        for name, dataset in parts.items()
    }


def tokenized(parts: Mapping[str, Examples], start: Pretrained) -> Mapping[str, Dataset]:
    """Return the parts of a split as tokenized rows with labels."""
    return {
        name: dataclasses.replace(
            start.encode(examples.texts, examples.pairs), labels=examples.labels
        )
        for name, examples in parts.items()
    }


def starting_point(
    config: TrainConfig, task: Task, training: Mapping[str, Examples], mesh: Mesh
) -> Pretrained:
    """Return the model before the first step: a pretrained encoder, or a new small ALBERT.

    Args:
        config: the configuration of the run.
        task: the task of the run.
        training: the training rows, with labels, as one part.
        mesh: the mesh of the run.

    Raises:
        InputError: a setting does not fit the task or the checkpoint, the mesh does not divide a
            size of the model, or the run does not fit into memory.
    """
    if task.is_regression and config.distill.temperature != 1:
        raise InputError(
            f"config.distill.temperature is {config.distill.temperature}, but task {task.name} is "
            "a regression task, whose scores have no temperature; it must be 1"
        )
    if task.is_regression and (config.sample_weights.decay or config.sample_weights.calibration):
        raise InputError(
            f"config.sample_weights is for classification, but task {task.name} is a regression "
            "task; decay and calibration must be 0"
        )
    bias = None
    if config.classifier_bias == "prior":
        (examples,) = training.values()
        assert examples.labels is not None  # `labeled_examples` raised InputError otherwise.
        bias = prior_bias(examples.labels, task.num_labels)
    if config.model:
        start = load_pretrained(
            config.model,
            num_labels=task.num_labels,
            dtype=config.dtype,
            seed=config.seed,
            exits=_exits(config),
            classifier_bias=bias,
        ).with_max_length(config.max_seq_length)
        _check_model(config, start.model.config, mesh)
        if config.strategy == "attach":
            _check_classifier(config, start)
        has_names = start.trained_exits != "none" and not are_numbered(start.label_names)
        if has_names and not config.label_names and task.label_names != start.label_names:
            raise other_classes(start.label_names, task)
    elif config.strategy == "attach":
        raise InputError("config.model is empty; give the classifier that gets exits")
    elif config.task == "demo":
        start = _from_scratch(config, task, mesh, bias)
    else:
        raise InputError("config.model is empty; give a Hugging Face hub id or a directory")
    return dataclasses.replace(start, label_names=task.label_names, criterion=None)


def _check_classifier(config: TrainConfig, start: Pretrained) -> None:
    """Raise InputError unless the exits can be attached to the classifier `start`."""
    if start.trained_exits == "none":
        raise InputError(
            "config.strategy is 'attach', which gives exits to a trained classifier, but "
            f"{config.model} has no classification head"
        )
    if start.trained_exits == "last" and config.pooling != start.head_pooling:
        raise InputError(
            f"config.pooling is {config.pooling!r}, but the classification head of {config.model} "
            f"reads {start.head_pooling!r}; exits that are attached read the same"
        )


def _exits(config: TrainConfig) -> dict[str, str]:
    return {"exit_pooler": config.pooler, "exit_pooling": config.pooling}


def _check_model(config: TrainConfig, model: ModelConfig, mesh: Mesh) -> None:
    """Raise InputError if a run with this model cannot be started."""
    if model.num_hidden_layers == 1:
        refuse_changed(
            config,
            ("strategy", "gradient", "distill.weight", "exit_learning_rate")
            + ("sample_weights.decay", "sample_weights.calibration"),
            "the model has one layer, so there is no early exit",
        )
    sharding.check_model(model, mesh, shard_parameters=config.mesh.shard_parameters)
    # The texts are not tokenized yet, so that the shortest possible batch counts.
    shortest = training_lengths(config.max_seq_length, config.order)[0]
    memory.check(config, model, mesh, shortest)


def check_same_everywhere(
    config: TrainConfig, inputs: Mapping[str, str], start: Pretrained
) -> None:
    """Raise InputError unless all processes have the same settings, rows and parameters.

    `inputs` are the `input_hashes`. Every process reads its own files. Without this check,
    processes with different files would train together without an error. The call waits for all
    processes.

    Raises:
        InputError: the first setting or hash that differs between processes.
    """
    if jax.process_count() == 1:
        return
    fields = traverse_util.flatten_dict(dataclasses.asdict(config), sep=".")
    # Paths may differ between machines: the contents of the files are compared instead.
    values = {name: value for name, value in fields.items() if name not in PLACES}
    values |= {f"the hash of the {name}": value for name, value in inputs.items()}
    values["the hash of the initial parameters"] = _hash(split(start.model)[1])
    first_values, *other_values = processes.gather(values)
    for process, process_values in enumerate(other_values, start=1):
        for name, value in first_values.items():
            if process_values.get(name) != value:
                raise InputError(
                    "all processes need the same settings, rows and parameters; "
                    f"{name} is {value!r} on process 0 and {process_values.get(name)!r} on "
                    f"process {process}"
                )


def input_hashes(
    config: TrainConfig, start: Pretrained, data: Mapping[str, Mapping[str, Dataset]]
) -> dict[str, str]:
    """Return hashes of the tokenized rows and of the pretrained parameters of a run, by name.

    Pooler and classifiers are left out: random initial values may differ in their last bit between
    platforms.
    """
    hashes = {
        f"{name} rows": _hash([vars(dataset) for dataset in parts.values()])
        for name, parts in data.items()
    }
    if config.model:
        parameters = split(start.model)[1]
        encoder = {
            name: value
            for name, value in parameters.items()
            if not name.startswith(("pooler.", "classifiers."))
        }
        hashes["pretrained parameters"] = _hash(encoder)
    return hashes


def _hash(arrays: Any) -> str:
    digest = hashlib.sha256()
    for array in jax.tree.leaves(arrays):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def prior_bias(labels: np.ndarray, num_labels: int) -> np.ndarray:
    """Return the bias (C,) with the lowest loss for a classifier whose kernel is 0.

    The bias is the mean score for regression, and the logarithms of the class frequencies for
    classification. A class without rows counts as a class with one row, because a bias of -inf
    could not change in training.
    """
    if num_labels == 1:
        return np.array([labels.mean()], np.float32)
    counts = np.bincount(labels, minlength=num_labels)
    return np.log(np.maximum(counts, 1) / len(labels)).astype(np.float32)


def _from_scratch(
    config: TrainConfig, task: Task, mesh: Mesh, bias: np.ndarray | None
) -> Pretrained:
    scratch = dataclasses.asdict(config.scratch)
    rate = scratch.pop("dropout")
    tokenizer = demo.tokenizer()
    values = {
        "model_type": "albert",
        "vocab_size": len(tokenizer),
        "max_position_embeddings": config.max_seq_length,
        "hidden_dropout_prob": rate,
        "attention_probs_dropout_prob": rate,
        "classifier_dropout_prob": rate,
        **_exits(config),
        **scratch,
    }
    model_config = ModelConfig.from_hugging_face(values, task.num_labels)
    _check_model(config, model_config, mesh)
    model = EarlyExitModel(model_config, dtype=config.dtype, rngs=nnx.Rngs(config.seed))
    if bias is not None:
        model.classifiers.bias.set_value(model.classifiers.bias[...] + bias)
    return Pretrained(model, tokenizer, values, task.label_names, config.max_seq_length)
