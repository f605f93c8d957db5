"""Exports a checkpoint as one serialized program, for machines without the model's code.

python -m pabee_jax.export --checkpoint runs/mrpc --output exported/mrpc --platforms cpu,cuda,tpu

    from pabee_jax.export import load
    predictions = load("exported/mrpc").predict({"input_ids": ids, "attention_mask": mask})

The program maps tokens to logits; the tokenizer is not exported. The directory contains

- `artifact.program`: a `jax.export` artifact of the driver `loop`, for any number of rows and one
  sequence length. Its inputs are (weights by name, `input_ids`, `attention_mask` and
  `token_type_ids` by name, each (N, sequence_length) int32, the criterion's values by name); its
  outputs are (exit layers (N,) int32 from 1, logits (N, C) float32). The program contains the loop
  and thus the exit, so a new patience needs no new program. jax guarantees that newer versions can
  read a `jax.export` artifact for six months.
- `artifact.safetensors`: the weights, in the compute type.
- `artifact.json`: see `Artifact`. It is written last: a directory that contains it is complete.
"""

import contextlib
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export
from safetensors.numpy import save

from pabee_jax.criteria import CRITERIA
from pabee_jax.drivers import loop
from pabee_jax.errors import InputError
from pabee_jax.inference import planning
from pabee_jax.inference.artifact import (
    ARTIFACT_FILE,
    PROGRAM_FILE,
    TOKENS,
    WEIGHTS_FILE,
    Artifact,
    ExportedClassifier,
    load,
    require_flatbuffers,
    thresholds,
)
from pabee_jax.inference.classifier import EarlyExitClassifier
from pabee_jax.io import storage
from pabee_jax.io.atomic import write_atomically
from pabee_jax.models.parameters import merge, split

__all__ = ["Artifact", "ExportedClassifier", "export", "load"]

# jax itself accepts any platform name at export and raises only when the program runs.
KNOWN_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
DEFAULT_PLATFORMS = ("cpu", "cuda", "tpu")


def export(
    classifier: EarlyExitClassifier,
    output: str | Path,
    *,
    platforms: Sequence[str] = DEFAULT_PLATFORMS,
    sequence_length: int | None = None,
) -> None:
    """Export the classifier's model and criterion as a program that `load` runs.

    Args:
        classifier: its criterion becomes the default of the program; its driver is not used.
        output: a directory without an exported program, created if absent.
        platforms: where the program can run: some of cpu, cuda, rocm, tpu. The exporting machine
            needs none of them.
        sequence_length: tokens per row; absent, the length to which the checkpoint truncates texts.

    Raises:
        InputError: `platforms` is empty or has an unknown platform, `sequence_length` is below 1 or
            exceeds the model's positions, the criterion is of a custom class, `output` already
            contains a program or cannot be written, or flatbuffers is not installed.
    """
    output = storage.local_path_of(output)
    platforms = [platforms] if isinstance(platforms, str) else platforms
    check_arguments(output, platforms, sequence_length)
    config, length = classifier.config, exported_length(classifier, sequence_length)
    platforms = tuple(dict.fromkeys(platforms))
    weights = jax.device_get(split(classifier.model)[1])
    contents = {
        PROGRAM_FILE: bytes(_program(classifier, length, platforms).serialize()),
        WEIGHTS_FILE: save({name: np.ascontiguousarray(array) for name, array in weights.items()}),
    }
    artifact = Artifact(
        platforms=platforms,
        sequence_length=length,
        dtype=classifier.pretrained.model.dtype.name,
        vocab_size=config.vocab_size,
        type_vocab_size=max(1, config.type_vocab_size),  # All segment ids of a row may be 0.
        max_position_embeddings=config.max_length,
        num_labels=config.num_labels,
        num_layers=config.num_hidden_layers,
        label_names=classifier.pretrained.label_names,
        criterion=classifier.criterion,
        trained_exits=classifier.pretrained.trained_exits,
        jax_version=jax.__version__,
        sha256={name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
    )
    _write(output, contents | {ARTIFACT_FILE: artifact.to_json().encode()})


def exported_length(classifier: EarlyExitClassifier, sequence_length: int | None) -> int:
    """Return the tokens per row of an exported program.

    Raises:
        InputError: `sequence_length` is no size or exceeds the model's positions, or the criterion
            is a custom class.
    """
    planning.check_size("sequence_length", sequence_length)
    if type(classifier.criterion) not in CRITERIA.values():
        raise InputError(
            f"the exit criterion {type(classifier.criterion).__name__} is a custom class, which "
            f"another process cannot load; known are {', '.join(CRITERIA)}"
        )
    length = sequence_length or classifier.pretrained.max_length
    if length > classifier.config.max_length:
        raise InputError(
            f"sequence_length is {length}, but the model has {classifier.config.max_length} "
            "positions"
        )
    return length


def _program(
    classifier: EarlyExitClassifier, sequence_length: int, platforms: Sequence[str]
) -> jax_export.Exported:
    """Export the driver `loop` for any number of rows, with weights and thresholds as inputs."""
    structure, parameters = split(classifier.model)
    criterion_class = type(classifier.criterion)

    def run(weights, tokens, values):
        return loop.early_exit(merge(structure, weights), tokens, criterion_class(**values))

    shape = (*jax_export.symbolic_shape("rows"), sequence_length)
    inputs = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        (
            parameters,
            {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in TOKENS},
            thresholds(classifier.criterion),
        ),
    )
    return jax_export.export(jax.jit(run), platforms=platforms)(*inputs)


def check_arguments(output: Path, platforms: Sequence[str], sequence_length: int | None) -> None:
    """Raise InputError for arguments of `export` that are wrong whatever the checkpoint is."""
    planning.check_size("sequence_length", sequence_length)
    known = ", ".join(KNOWN_PLATFORMS)
    if not platforms:
        raise InputError(f"platforms is empty; known are {known}")
    for platform in platforms:
        if platform not in KNOWN_PLATFORMS:
            raise InputError(f"unknown platform {platform!r}; known are {known}")
    require_flatbuffers()
    if (output / ARTIFACT_FILE).exists():
        raise InputError(
            f"{output} already contains an exported program: give another directory, or delete it"
        )
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise InputError(f"{existing} is a file; the output must be a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"the output {output} cannot be written: {existing} is not writable")


def _write(output: Path, contents: Mapping[str, bytes]) -> None:
    """Write the files in the given order; delete all of them if one cannot be written."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, data in contents.items():
            write_atomically(output / name, lambda path, data=data: path.write_bytes(data))
    except OSError as error:
        for name in contents:
            with contextlib.suppress(OSError):
                (output / name).unlink(missing_ok=True)
        raise InputError(f"the output {output} cannot be written: {error.strerror}") from None
