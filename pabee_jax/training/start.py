"""Where a run starts: its rows, and the model before the first step."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx, traverse_util

from pabee_jax.checkpoints.pretrained import Pretrained, load_pretrained
from pabee_jax.data import demo
from pabee_jax.data.dataset import Dataset
from pabee_jax.data.task import Examples, Task
from pabee_jax.distributed import processes
from pabee_jax.errors import InputError
from pabee_jax.models.config import ModelConfig
from pabee_jax.models.encoder import EarlyExitModel
from pabee_jax.models.parameters import split
from pabee_jax.training.config import PLACES, TrainConfig, refuse_changed


def labeled_examples(task: Task, split: str) -> Mapping[str, Examples]:
    """The parts of a split, all of which must have labels."""
    parts = task.read(split)
    for name, examples in parts.items():
        if examples.labels is None:
            raise InputError(f"the {name} rows of task {task.name} have no labels")
    return parts


def tokenized(parts: Mapping[str, Examples], start: Pretrained) -> Mapping[str, Dataset]:
    """The parts of a split as arrays."""
    return {
        name: dataclasses.replace(
            start.encode(examples.texts, examples.pairs), labels=examples.labels
        )
        for name, examples in parts.items()
    }


def starting_point(config: TrainConfig, task: Task, training: Mapping[str, Examples]) -> Pretrained:
    """The model that training starts from: a pretrained encoder, or a small ALBERT from scratch.

    Raises:
        InputError: a setting that does not fit the task or the checkpoint.
    """
    if task.is_regression and config.distill.temperature != 1:
        raise InputError(
            f"config.distill.temperature is {config.distill.temperature}, but task {task.name} is "
            "a regression: there is nothing to soften"
        )
    exits = {"exit_pooler": config.pooler, "exit_pooling": config.pooling}
    bias = None
    if config.classifier_bias == "prior":
        (examples,) = training.values()
        assert examples.labels is not None  # `labeled_examples` checked it.
        bias = prior_bias(examples.labels, task.num_labels)
    if config.model:
        start = load_pretrained(
            config.model,
            num_labels=task.num_labels,
            dtype=config.dtype,
            seed=config.seed,
            exits=exits,
            classifier_bias=bias,
        )
    elif config.task == "demo":
        start = _from_scratch(config, task, exits, bias)
    else:
        raise InputError("config.model is empty: give a Hugging Face hub id or a directory")
    start = start.with_max_length(config.max_seq_length)
    if start.model.config.num_hidden_layers == 1:
        refuse_changed(
            config,
            ("strategy", "gradient", "distill.weight"),
            "the model has one layer: there is no early exit to train",
        )
    return dataclasses.replace(start, label_names=task.label_names, criterion=None)


def check_same_everywhere(
    config: TrainConfig, start: Pretrained, data: Mapping[str, Mapping[str, Dataset]]
) -> None:
    """Whether all processes of this run would train the same; waits for all of them.

    Each reads its own files, and what differs would be trained on in silence.

    Raises:
        InputError: another process has other settings, rows or parameters.
    """
    if jax.process_count() == 1:
        return
    ours = traverse_util.flatten_dict(dataclasses.asdict(config), sep=".")
    # Where a machine keeps its copy is its own affair: what is in it is compared.
    ours = {name: value for name, value in ours.items() if name not in PLACES}
    ours |= {
        f"the {name} rows": _digest([vars(dataset) for dataset in parts.values()])
        for name, parts in data.items()
    }
    ours["the parameters before the first step"] = _digest(split(start.model)[1])
    first, *others = processes.gathered(ours)
    for process, theirs in enumerate(others, start=1):
        for name, value in first.items():
            if theirs.get(name) != value:
                raise InputError(
                    f"the processes of a run must be alike, but {name}: {value!r} in process 0, "
                    f"{theirs.get(name)!r} in process {process}"
                )


def _digest(arrays: Any) -> str:
    digest = hashlib.sha256()
    for array in jax.tree.leaves(arrays):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def prior_bias(labels: np.ndarray, num_labels: int) -> np.ndarray:
    """(C,) the bias with which a classifier that reads nothing predicts best.

    The mean score, or the logarithms of the class frequencies; a class without any row counts as
    having one, because the logarithm of 0 would never let it be learnt.
    """
    if num_labels == 1:
        return np.array([labels.mean()], np.float32)
    counts = np.bincount(labels, minlength=num_labels)
    return np.log(np.maximum(counts, 1) / len(labels)).astype(np.float32)


def _from_scratch(
    config: TrainConfig, task: Task, exits: Mapping[str, str], bias: np.ndarray | None
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
        **exits,
        **scratch,
    }
    shape = ModelConfig.from_hugging_face(values, task.num_labels)
    model = EarlyExitModel(shape, dtype=config.dtype, rngs=nnx.Rngs(config.seed))
    if bias is not None:
        model.classifiers.bias.set_value(model.classifiers.bias[...] + bias)
    return Pretrained(model, tokenizer, values, task.label_names, config.max_seq_length)
