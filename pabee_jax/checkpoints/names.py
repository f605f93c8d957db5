"""Conversion between a checkpoint's tensors and the model's parameters: names and layouts.

The tables of `checkpoints/families.py` map each parameter of the model to its name in a PyTorch
checkpoint. Loading looks these names up in the checkpoint, and saving writes them. The names are
PyTorch PABEE's: Hugging Face's names plus `classifiers.{i}`. Exits that PyTorch PABEE cannot
compute have names that PyTorch PABEE does not load: `exit_classifiers.{i}` and `exit_pooler` or,
with one pooler per exit, `exit_poolers.{i}`.

A sequence classifier of Hugging Face has one classification head. The head becomes the last exit,
and the other exits start with its pooler.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx, traverse_util

from pabee_jax.checkpoints.families import EXIT_POOLER, FAMILY_NAMES, Tensors
from pabee_jax.errors import InputError
from pabee_jax.models.config import ModelConfig, exit_modules
from pabee_jax.models.encoder import EarlyExitModel
from pabee_jax.models.parameters import merge, split

# The model's leaf name -> PyTorch's leaf name. Hugging Face's Flax checkpoints have the model's
# leaf names.
_LEAF_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
_OLD_NAMES = [(r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")]
# The classifiers of PABEE's exits, and the classifiers of exits that PyTorch PABEE cannot compute.
CLASSIFIERS_NAMES = ("classifiers", "exit_classifiers")
# Parameters that are initialized from scratch if the checkpoint lacks them. A missing parameter of
# the encoder is an error.
_MAY_BE_MISSING = re.compile(r"(pooler|classifiers|exit_poolers?|exit_classifiers)\.")
# The prefixes of `torch.compile`, of `DataParallel` and of a Lightning module that has the model as
# its attribute `model`. ModernBERT's own prefix is the same word.
_WRAPPERS = ("_orig_mod", "module", "model")
_FAMILY_PREFIXES = {names.prefix for names in FAMILY_NAMES.values()} - {*_WRAPPERS}
_PREFIX = re.compile(rf"((?:{'|'.join([*_WRAPPERS, *_FAMILY_PREFIXES])})\.)*")


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
    has_head: bool = True,
    source: str = "the checkpoint",
) -> tuple[EarlyExitModel, LoadReport]:
    """Return the model with a checkpoint's tensors, and a report of the differences.

    Args:
        tensors: the tensors under PyTorch's names, as `files.read_tensors` returns them.
        dtype: the compute dtype; the parameters are float32.
        seed: the seed for parameters that the checkpoint lacks (pooler, classifiers).
        classifier_bias: (C,) the initial bias of classifiers that the checkpoint lacks; 0 if None.
        has_head: whether the checkpoint's classification head, if it has one, is for sequences.
        source: the name of the checkpoint in messages.

    Raises:
        InputError: a tensor has the wrong shape, or a parameter of the encoder is missing.
    """
    names_of_family = FAMILY_NAMES[config.family]
    _check_prefixes(tensors, names_of_family.prefix, source)
    tensors = _with_canonical_names(tensors, source)
    tensors = names_of_family.prepare(tensors)
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
    _check_encoder([name for names in missing.values() for name in names], tensors, source)
    if missing:
        loaded |= _initial_values(config, dtype, seed, tuple(missing))
    if classifier_bias is not None and "classifiers.bias" in missing:
        loaded["classifiers.bias"] += classifier_bias
    for path in [path for path in missing if path.startswith("classifiers.")]:
        name = f"{names_of_family.classifier}.{_LEAF_NAMES[path.rpartition('.')[2]]}"
        if has_head and name in tensors:
            head = _checked(tensors[name], name, path, shapes[path].shape[1:], source)
            loaded[path] = jnp.asarray(loaded[path]).at[-1].set(head)
            missing[path] = missing[path][:-1]
            used.add(name)
    absent_names = [name for names in missing.values() for name in names]
    loaded = {path: jnp.asarray(value, jnp.float32) for path, value in loaded.items()}
    report = LoadReport(tuple(absent_names), tuple(sorted(tensors.keys() - used)))
    return merge(structure, loaded), report


def to_tensors(model: EarlyExitModel) -> dict[str, np.ndarray]:
    """Return the parameters of an unstacked model in float32 by their names in a checkpoint."""
    names_of_family = FAMILY_NAMES[model.config.family]
    result = {}
    for path, value in split(model)[1].items():
        value = np.asarray(value, np.float32)
        names = torch_names(path, model.config)
        if _is_per_exit(path, model.config):
            result |= {
                name: _transposed(part, path) for name, part in zip(names, value, strict=True)
            }
        else:
            prefix = "" if names[0].startswith(EXIT_POOLER) else f"{names_of_family.prefix}."
            result[prefix + names[0]] = _transposed(value, path)
    return dict(names_of_family.restore(result))


def canonical_name(name: str) -> str:
    """Return a tensor's name without wrapper and family prefixes, and with current leaf names.

    No canonical name starts with one of these prefixes, so they are removed in any combination.
    """
    name = _PREFIX.sub("", name, count=1)
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


def to_flax_names(tensors: Tensors) -> dict[str, Any]:
    """Return a tree of tensors as Hugging Face's Flax classes have them: the inverse.

    Args:
        tensors: tensors under PyTorch's names and in PyTorch's layouts.
    """
    flat = {}
    for name, value in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight":
            is_norm = value.ndim == 1
            leaf = "scale" if is_norm else "embedding" if "_embeddings" in module else "kernel"
        flat[(*module.split("."), leaf)] = np.ascontiguousarray(_transposed(value, leaf))
    return traverse_util.unflatten_dict(flat)


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
    for pattern, replacement in FAMILY_NAMES[config.family].modules:
        match = re.fullmatch(pattern, module)
        if match:
            return [f"{match.expand(replacement)}.{leaf}"]
    raise KeyError(f"no checkpoint name for parameter {path}")


def _names_in(tensors: Tensors, path: str, config: ModelConfig) -> list[str]:
    """Return the checkpoint names from which a parameter is loaded."""
    names = torch_names(path, config)
    module, _, leaf = path.rpartition(".")
    if module == "pooler" and not any(name in tensors for name in names):
        # The pooler of every exit is initialized from that of the head, as in DeeBERT.
        for pooler in FAMILY_NAMES[config.family].poolers:
            if f"{pooler}.weight" in tensors:
                return [f"{pooler}.{_LEAF_NAMES[leaf]}"] * len(names)
    return names


def head_labels(tensors: Tensors, family: str) -> int | None:
    """Return the number of outputs of a checkpoint's classification head, or None without head."""
    classifier = f"{FAMILY_NAMES[family].classifier}.weight"
    for name, tensor in tensors.items():
        if canonical_name(name) == classifier and tensor.ndim:
            return tensor.shape[0]
    return None


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


def _check_prefixes(tensors: Tensors, prefix: str, source: str) -> None:
    """Raise InputError if the names of the encoder's tensors are those of another family."""
    prefixes = {part for name in tensors for part in _prefix_of(name).split(".")}
    others = sorted(prefixes & _FAMILY_PREFIXES)
    if others and prefix not in others:
        raise InputError(
            f"{source}: the weights have names of {_listed(others)}.*, but config.json describes a "
            f"model whose weights are {prefix}.*"
        )


def _prefix_of(name: str) -> str:
    match = _PREFIX.match(name)
    return match.group() if match else ""


def _with_canonical_names(tensors: Tensors, source: str) -> dict[str, np.ndarray]:
    """Return the tensors by canonical name, without position ids, which are no parameters.

    Raises:
        InputError: two tensors have the same canonical name, as of a model and its teacher.
    """
    names: dict[str, str] = {}
    for name in tensors:
        canonical = canonical_name(name)
        if "position_ids" in canonical:
            continue
        if canonical in names:
            raise InputError(
                f"{source} has two tensors {canonical}: {names[canonical]} and {name}; keep the "
                "tensors of one model"
            )
        names[canonical] = name
    return {canonical: tensors[name] for canonical, name in names.items()}


def _check_layers(config: ModelConfig, num_tensors: int, source: str) -> None:
    """Raise InputError for more layers than tensors; building so many layers takes minutes."""
    layers = config.num_hidden_groups * config.inner_group_num
    if layers > num_tensors:
        raise InputError(
            f"{source}: config.json describes {layers} layers with their own parameters, but the "
            f"weights are only {num_tensors} tensors"
        )


def _check_encoder(missing: list[str], tensors: Tensors, source: str) -> None:
    """Raise InputError if parameters of the encoder are missing; explain an unknown prefix."""
    required = [name for name in missing if not _MAY_BE_MISSING.match(name)]
    if not required:
        return
    prefixed = next((name for name in tensors if name.endswith(f".{required[0]}")), None)
    reason = "it is not a checkpoint of the model that its config.json describes"
    if prefixed:
        prefix = prefixed.removesuffix(required[0])
        reason = f"the names of its tensors start with {prefix!r}: rename them without this prefix"
    raise InputError(
        f"{source} lacks {len(required)} of the encoder's parameters ({_listed(required)}); "
        f"{reason}"
    )


def _listed(names, limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
