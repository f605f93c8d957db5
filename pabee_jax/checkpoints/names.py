"""Conversion between a checkpoint's tensors and the model's parameters: names and layouts.

One table of regular expressions per family maps each parameter of the model to its name in a
PyTorch checkpoint. Loading looks these names up in the checkpoint, and saving writes them. The
names are PyTorch PABEE's: Hugging Face's names plus `classifiers.{i}`. Exits that PyTorch PABEE
cannot compute have names that PyTorch PABEE does not load: `exit_classifiers.{i}` and, with one
pooler per exit, `exit_poolers.{i}`.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx, traverse_util

from pabee_jax.errors import InputError
from pabee_jax.models.config import FAMILIES, ModelConfig, exit_modules
from pabee_jax.models.encoder import EarlyExitModel
from pabee_jax.models.parameters import merge, split

Tensors = Mapping[str, np.ndarray]

# The model's module path -> PyTorch's module path.
_COMMON = [
    (r"embeddings\.word", r"embeddings.word_embeddings"),
    (r"embeddings\.position", r"embeddings.position_embeddings"),
    (r"embeddings\.token_type", r"embeddings.token_type_embeddings"),
    (r"embeddings\.norm", r"embeddings.LayerNorm"),
]
_BERT_LAYER = r"groups\.(\d+)\.inner\.0\."
_ALBERT_LAYER = r"groups\.(\d+)\.inner\.(\d+)\."
_IN_BERT = r"encoder.layer.\1."
_IN_ALBERT = r"encoder.albert_layer_groups.\1.albert_layers.\2."
MODULE_NAMES = {
    "bert": [
        *_COMMON,
        (_BERT_LAYER + r"(query|key|value)_projection", _IN_BERT + r"attention.self.\2"),
        (_BERT_LAYER + r"attention_output", _IN_BERT + r"attention.output.dense"),
        (_BERT_LAYER + r"attention_norm", _IN_BERT + r"attention.output.LayerNorm"),
        (_BERT_LAYER + r"intermediate", _IN_BERT + r"intermediate.dense"),
        (_BERT_LAYER + r"output", _IN_BERT + r"output.dense"),
        (_BERT_LAYER + r"output_norm", _IN_BERT + r"output.LayerNorm"),
        (r"pooler", r"pooler.dense"),
    ],
    "albert": [
        *_COMMON,
        (r"embeddings\.projection", r"encoder.embedding_hidden_mapping_in"),
        (_ALBERT_LAYER + r"(query|key|value)_projection", _IN_ALBERT + r"attention.\3"),
        (_ALBERT_LAYER + r"attention_output", _IN_ALBERT + r"attention.dense"),
        (_ALBERT_LAYER + r"attention_norm", _IN_ALBERT + r"attention.LayerNorm"),
        (_ALBERT_LAYER + r"intermediate", _IN_ALBERT + r"ffn"),
        (_ALBERT_LAYER + r"output", _IN_ALBERT + r"ffn_output"),
        (_ALBERT_LAYER + r"output_norm", _IN_ALBERT + r"full_layer_layer_norm"),
        (r"pooler", r"pooler"),
    ],
}
# The model's leaf name -> PyTorch's leaf name. Hugging Face's Flax checkpoints have the model's
# leaf names.
_LEAF_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
_OLD_NAMES = [(r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")]
# The classifiers of PABEE's exits, and the classifiers of exits that PyTorch PABEE cannot compute.
CLASSIFIERS_NAMES = ("classifiers", "exit_classifiers")
# Parameters that are initialized from scratch if the checkpoint lacks them. A missing parameter of
# the encoder is an error.
_MAY_BE_MISSING = re.compile(r"(pooler|classifiers|exit_poolers|exit_classifiers)\.")


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """The differences between a checkpoint and the model, as PyTorch names without family prefix.

    Attributes:
        missing: the parameters that the checkpoint lacks; they are initialized from the seed.
        unexpected: the checkpoint's tensors that the model does not use, such as an MLM head.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def from_tensors(
    tensors: Tensors,
    config: ModelConfig,
    *,
    dtype: str = "float32",
    seed: int = 0,
    classifier_bias: np.ndarray | None = None,
    source: str = "the checkpoint",
) -> tuple[EarlyExitModel, LoadReport]:
    """Return the model with a checkpoint's tensors, and a report of the differences.

    Args:
        tensors: the tensors under PyTorch's names, as `files.read_tensors` returns them.
        dtype: the compute dtype; the parameters are float32.
        seed: the seed for parameters that the checkpoint lacks (pooler, classifiers).
        classifier_bias: (C,) the initial bias of classifiers that the checkpoint lacks; 0 if None.
        source: the name of the checkpoint in messages.

    Raises:
        InputError: a tensor has the wrong shape, or a parameter of the encoder is missing.
    """
    tensors = {canonical_name(name): tensor for name, tensor in tensors.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if "position_ids" not in name}
    _check_layers(config, len(tensors), source)
    structure, shapes = split(nnx.eval_shape(lambda: _initial_model(config, dtype, seed)))
    loaded, missing, used = {}, {}, set()
    for path, shape in shapes.items():
        names = _names_in(tensors, path, config)
        used.update(names)
        absent = [name for name in names if name not in tensors]
        if absent and len(absent) < len(names):
            raise InputError(
                f"{source} has {names[0].split('.')[0]} for some exits, but lacks {_listed(absent)}"
            )
        if absent:
            missing[path] = list(dict.fromkeys(absent))
            continue
        per_exit = _is_per_exit(path, config)
        expected = shape.shape[1:] if per_exit else shape.shape
        parts = [_checked(tensors[name], name, path, expected, source) for name in names]
        loaded[path] = np.stack(parts) if per_exit else parts[0]
    absent_names = [name for names in missing.values() for name in names]
    _check_encoder(absent_names, source)
    if missing:
        loaded |= _initial_values(config, dtype, seed, tuple(missing))
    if classifier_bias is not None and "classifiers.bias" in missing:
        loaded["classifiers.bias"] += classifier_bias
    loaded = {path: jnp.asarray(value, jnp.float32) for path, value in loaded.items()}
    report = LoadReport(tuple(absent_names), tuple(sorted(tensors.keys() - used)))
    return merge(structure, loaded), report


def to_tensors(model: EarlyExitModel) -> dict[str, np.ndarray]:
    """Return the parameters of an unstacked model in float32 by their names in a checkpoint."""
    prefix = model.config.family
    result = {}
    for path, value in split(model)[1].items():
        value = np.asarray(value, np.float32)
        names = torch_names(path, model.config)
        if _is_per_exit(path, model.config):
            result |= {
                name: _transposed(part, path) for name, part in zip(names, value, strict=True)
            }
        else:
            result[f"{prefix}.{names[0]}"] = _transposed(value, path)
    return result


def canonical_name(name: str) -> str:
    """Return a tensor's name without wrapper and family prefixes, and with current leaf names."""
    name = re.sub(rf"^(module\.)?(({'|'.join(FAMILIES)})\.)?", "", name)
    for old, new in _OLD_NAMES:
        name = re.sub(old, new, name)
    return name


def from_flax_names(parameters: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of a Hugging Face Flax checkpoint under PyTorch's names and layouts."""
    for path, value in traverse_util.flatten_dict(parameters).items():
        path = tuple(part for part in path if part != "layers")  # The lists of Flax ALBERT.
        *modules, leaf = map(str, path)
        name = ".".join((*modules, _LEAF_NAMES.get(leaf, leaf)))
        yield name, _transposed(np.asarray(value), leaf)


def log_report(report: LoadReport, source: str) -> None:
    """Log the names of missing parameters and unused tensors as warnings."""
    if report.missing:
        logging.warning("%s lacks %s; initialized from scratch", source, _listed(report.missing))
    if report.unexpected:
        logging.warning("%s has unused tensors: %s", source, _listed(report.unexpected))


def torch_names(path: str, config: ModelConfig) -> list[str]:
    """Return the checkpoint names of a parameter: one name, or one name per exit."""
    module, _, leaf = path.rpartition(".")
    leaf = _LEAF_NAMES[leaf]
    if _is_per_exit(path, config):
        name = {"classifiers": classifiers_name(config), "pooler": "exit_poolers"}[module]
        return [f"{name}.{exit}.{leaf}" for exit in range(config.num_hidden_layers)]
    for pattern, replacement in MODULE_NAMES[config.family]:
        match = re.fullmatch(pattern, module)
        if match:
            return [f"{match.expand(replacement)}.{leaf}"]
    raise KeyError(f"no checkpoint name for parameter {path}")


def _names_in(tensors: Tensors, path: str, config: ModelConfig) -> list[str]:
    """Return the checkpoint names from which a parameter is loaded."""
    names = torch_names(path, config)
    if path.startswith("pooler.") and not any(name in tensors for name in names):
        # The pooler of every exit is initialized from the encoder's pooler, as in DeeBERT.
        return torch_names(path, dataclasses.replace(config, exit_pooler="shared")) * len(names)
    return names


def classifiers_name(config: ModelConfig) -> str:
    """Return the checkpoint name of the classifiers for this configuration's exits."""
    return CLASSIFIERS_NAMES[0 if config.is_pabee else 1]


def _is_per_exit(path: str, config: ModelConfig) -> bool:
    return path.partition(".")[0] in exit_modules(config.exit_pooler)


def _transposed(value: np.ndarray, path: str) -> np.ndarray:
    """Return a kernel transposed: PyTorch stores (out, in), and flax stores (in, out)."""
    return value.T if path.endswith("kernel") else value


def _checked(tensor: np.ndarray, name: str, path: str, shape: tuple, source: str) -> np.ndarray:
    value = _transposed(tensor, path)
    # For the kernel, (hidden, labels), and the bias, (labels,).
    if path.startswith("classifiers.") and value.ndim and value.shape[-1] != shape[-1]:
        raise InputError(
            f"{source}: {name} has {tensor.shape[0]} outputs, but num_labels or the task requires "
            f"{shape[-1]}"
        )
    if value.shape != shape:
        # The message gives the shape in the checkpoint's layout.
        expected = shape[::-1] if path.endswith("kernel") else shape
        raise InputError(
            f"{source}: {name} has shape {tensor.shape}, but config.json requires {expected}"
        )
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise InputError(
            f"{source}: {name} holds {tensor.dtype} values, but parameters are floating-point: a "
            "quantized checkpoint cannot be loaded"
        )
    if not np.isfinite(np.asarray(value, np.float32)).all():
        raise InputError(f"{source}: {name} holds values that are not finite (NaN or infinity)")
    return value


def _initial_model(config: ModelConfig, dtype: str, seed: int) -> EarlyExitModel:
    return EarlyExitModel(config, dtype=dtype, rngs=nnx.Rngs(seed))


@functools.partial(jax.jit, static_argnums=range(4))
def _initial_values(config: ModelConfig, dtype: str, seed: int, paths: tuple[str, ...]):
    """Return the initial values of these parameters; the compiler drops all other parameters."""
    parameters = split(_initial_model(config, dtype, seed))[1]
    return {path: parameters[path] for path in paths}


def _check_layers(config: ModelConfig, num_tensors: int, source: str) -> None:
    """Raise InputError for more layers than tensors; building so many layers takes minutes."""
    layers = config.num_hidden_groups * config.inner_group_num
    if layers > num_tensors:
        raise InputError(
            f"{source}: config.json describes {layers} layers with their own parameters, but the "
            f"weights are only {num_tensors} tensors"
        )


def _check_encoder(missing: list[str], source: str) -> None:
    required = [name for name in missing if not _MAY_BE_MISSING.match(name)]
    if required:
        raise InputError(
            f"{source} lacks {len(required)} of the encoder's parameters ({_listed(required)}); it "
            "is not a checkpoint of the model that its config.json describes"
        )


def _listed(names, limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
