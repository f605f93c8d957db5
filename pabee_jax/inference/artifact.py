"""Runs an exported program: tokens in, predictions out, without the model's code.

The layers, the criterion and the exit are inside the serialized program. This module prepares its
inputs, reads its outputs, and makes the checks that a compiled program cannot make.
"""

import dataclasses
import hashlib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import jax
import numpy as np
from jax import export as jax_export
from safetensors.numpy import load_file

from pabee_jax.criteria import ExitCriterion, as_arrays, check, from_config, to_config, warn
from pabee_jax.drivers.shapes import next_power_of_two
from pabee_jax.errors import InputError, first_line_of, shown
from pabee_jax.inference import planning
from pabee_jax.inference.inputs import Tokens, checked_tokens
from pabee_jax.inference.predictions import Predictions, predictions_of
from pabee_jax.io import storage

# Version of the directory's layout: its files, and the program's inputs and outputs.
FORMAT = 1
ARTIFACT_FILE = "artifact.json"
PROGRAM_FILE = "artifact.program"
WEIGHTS_FILE = "artifact.safetensors"
TOKENS = ("input_ids", "attention_mask", "token_type_ids")


@dataclasses.dataclass(frozen=True)
class Artifact:
    """The description of an exported program, stored as `artifact.json`.

    Attributes:
        platforms: platforms on which the program runs: "cpu", "cuda", "rocm", "tpu".
        sequence_length: tokens per row, a constant of the program.
        dtype: compute type of the encoder, "float32" or "bfloat16".
        vocab_size: token ids are below it.
        type_vocab_size: segment ids are below it.
        max_position_embeddings: the largest sequence length of the model.
        num_labels: width C of the logits; 1 means regression.
        num_layers: the largest exit layer.
        label_names: class names by class id; empty for regression.
        criterion: the default criterion of `predict`. Its class is part of the program; its values
            (such as the patience) are inputs of the program.
        trained_exits: the exits that were trained: "all", "last" or "none".
        jax_version: version of the jax that wrote the program.
        sha256: hexadecimal digests of the program and of the weights, by file name.
    """

    platforms: tuple[str, ...]
    sequence_length: int
    dtype: str
    vocab_size: int
    type_vocab_size: int
    max_position_embeddings: int
    num_labels: int
    num_layers: int
    label_names: tuple[str, ...]
    criterion: ExitCriterion
    trained_exits: str
    jax_version: str
    sha256: dict[str, str]

    @property
    def max_length(self) -> int:
        """The largest sequence length of the model, as in `ModelConfig`."""
        return self.max_position_embeddings

    def to_json(self) -> str:
        """Return the text of `artifact.json`."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values |= {"format": FORMAT, "criterion": to_config(self.criterion)}
        values["sha256_of_this"] = _digest_of(values)
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    @classmethod
    def read(cls, directory: Path) -> "Artifact":
        """Read `artifact.json` from `directory`.

        Raises:
            InputError: the file is absent, damaged, or of another format version.
        """
        path = directory / ARTIFACT_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(
                f"{directory} is not an exported program: it has no {ARTIFACT_FILE}, the file that "
                "`pabee-jax export` writes last"
            ) from None
        except (ValueError, RecursionError) as error:  # Not JSON, or values that Python refuses.
            raise InputError(
                f"{path} is damaged: it is not JSON ({first_line_of(error)})"
            ) from None
        except OSError as error:
            raise InputError(f"{path} cannot be read: {storage.reason_of(error)}") from None
        if not isinstance(values, dict) or "format" not in values:
            raise InputError(f"{path} is damaged: it has no format version")
        if values["format"] != FORMAT:
            raise InputError(
                f"{path} has format version {shown(values['format'])}, but this pabee_jax reads "
                f"version {FORMAT}: export the program again"
            )
        if values.pop("sha256_of_this", None) != _digest_of(values):
            raise InputError(f"{path} is damaged: its values do not match its sha256")
        values.setdefault("trained_exits", "all")  # Earlier versions did not write the field.
        field_types = get_type_hints(cls).items()
        return cls(**{name: _value(path, name, kind, values) for name, kind in field_types})


def _digest_of(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _value(path: Path, name: str, kind: Any, values: Mapping[str, Any]) -> Any:
    """Return field `name` of the JSON `values`, which must be of type `kind`."""
    value = values.get(name)
    if name == "criterion" and isinstance(value, dict):
        return from_config(value)
    if isinstance(value, list):
        value = tuple(value)
    is_valid = isinstance(value, get_origin(kind) or kind)
    if isinstance(value, int):
        is_valid = is_valid and not isinstance(value, bool) and value >= 1
    elif isinstance(value, tuple | dict):
        is_valid = is_valid and all(isinstance(part, str) for part in value)
    if not is_valid:
        raise InputError(f"{path} is damaged: {name} is {shown(value)}")
    return value


def thresholds(criterion: ExitCriterion) -> dict[str, np.ndarray]:
    """Return the criterion's values as a dict: `jax.export` does not serialize custom classes."""
    return dict(vars(as_arrays(criterion)))


def require_flatbuffers() -> None:
    """Raise InputError when flatbuffers, with which jax reads and writes programs, is missing."""
    try:
        importlib.import_module("flatbuffers")
    except ImportError:
        raise InputError(
            "exported programs need the package flatbuffers: pip install 'pabee_jax[export]'"
        ) from None


class ExportedClassifier:
    """A serialized early-exit program with its weights on the default device.

    Attributes:
        artifact: the description of the program.
    """

    def __init__(
        self,
        artifact: Artifact,
        program: jax_export.Exported,
        weights: Mapping[str, np.ndarray],
    ):
        self.artifact = artifact
        self._weights = jax.device_put(dict(weights))
        self._run = jax.jit(program.call)  # One compilation per number of rows.

    def predict(
        self,
        tokens: Tokens,
        criterion: ExitCriterion | None = None,
        batch_size: int = planning.DEFAULT_BATCH_SIZE,
    ) -> Predictions:
        """Predict tokenized rows.

        Args:
            tokens: `input_ids` and optionally `attention_mask` and `token_type_ids`, each
                (N, sequence_length) int. Rows are padded; the mask is 0 at padding tokens.
            criterion: any criterion of the exported criterion's class. Its values are inputs, so
                that new values do not recompile. Absent, the exported criterion.
            batch_size: rows that run together until the last row of the batch has exited. A
                smaller batch is padded with empty rows to a power of two; the program does not
                wait for empty rows.

        Raises:
            InputError: another sequence length, token ids that the model does not have, another
                class of criterion, or a batch size below 1.
        """
        planning.check_size("batch_size", batch_size)
        values = thresholds(self._checked_criterion(criterion))
        arrays = self._checked_tokens(tokens)
        dispatched = []
        for start in range(0, len(arrays["input_ids"]), batch_size):
            batch = {name: array[start : start + batch_size] for name, array in arrays.items()}
            outputs = self._run(self._weights, _pad_rows(batch), values)
            dispatched.append((len(batch["input_ids"]), outputs))
        # Fetch after dispatching all batches, so that the device does not wait for the host.
        batches = [
            (exit_layers[:rows], logits[:rows])
            for rows, (exit_layers, logits) in jax.device_get(dispatched)
        ]
        exit_layers, logits = map(np.concatenate, zip(*batches, strict=True))
        names = self.artifact.label_names
        return Predictions(predictions_of(logits), logits, exit_layers, names)

    def _checked_criterion(self, criterion: ExitCriterion | None) -> ExitCriterion:
        exported = self.artifact.criterion
        criterion = exported if criterion is None else criterion
        if type(criterion) is not type(exported):
            raise InputError(
                f"criterion is {criterion!r}, but this program was exported with the exit "
                f"criterion {type(exported).__name__}: give a setting of that criterion"
            )
        artifact = self.artifact
        check(criterion, artifact.num_layers, artifact.num_labels, artifact.trained_exits)
        warn(criterion, artifact.num_layers, artifact.num_labels == 1)
        return criterion

    def _checked_tokens(self, tokens: Tokens) -> dict[str, np.ndarray]:
        if not isinstance(tokens, Mapping):
            raise InputError(
                "an exported program has no tokenizer: it takes a dict of input_ids and optionally "
                "attention_mask and token_type_ids"
            )
        dataset = checked_tokens(tokens, self.artifact)
        columns, length = dataset.input_ids.shape[1], self.artifact.sequence_length
        if columns != length:
            raise InputError(
                f"input_ids has {columns} columns, but this program was exported for {length} "
                "tokens per row: pad or truncate the rows, and mask the padding"
            )
        return {name: getattr(dataset, name).astype(np.int32) for name in TOKENS}


def load(directory: str | Path) -> ExportedClassifier:
    """Load an exported program, with its weights on the default device.

    Raises:
        InputError: `directory` is not an exported program, a file is missing or damaged, the format
            version is another, the program is for other platforms or was written by a jax version
            that the installed jax cannot read, or flatbuffers is not installed.
    """
    directory = storage.local_path_of(directory)
    artifact = Artifact.read(directory)
    require_flatbuffers()
    platform = jax_export.default_export_platform()
    if platform not in artifact.platforms:
        raise InputError(
            f"{directory} was exported for {', '.join(artifact.platforms)}, but this process "
            f"runs on {platform}: export it again with --platforms {platform}"
        )
    program, weights = (
        _verified(directory / name, artifact) for name in (PROGRAM_FILE, WEIGHTS_FILE)
    )
    try:
        exported = jax_export.deserialize(bytearray(program.read_bytes()))
    except Exception as error:  # jax does not specify which error another version's bytes raise.
        raise InputError(
            f"jax {jax.__version__} cannot read {program}, which jax {artifact.jax_version} wrote: "
            f"export the program again ({first_line_of(error)})"
        ) from None
    try:
        tensors = load_file(weights)
    except Exception as error:  # safetensors raises different exceptions for a damaged file.
        raise InputError(f"{weights} is damaged: {first_line_of(error)}") from None
    return ExportedClassifier(artifact, exported, tensors)


def _verified(path: Path, artifact: Artifact) -> Path:
    """Return `path` if the file has the sha256 that `artifact` records.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise InputError(f"{path} is missing: export the program again") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {storage.reason_of(error)}") from None
    if digest != artifact.sha256.get(path.name):
        raise InputError(f"{path} is damaged: its sha256 differs from that in {ARTIFACT_FILE}")
    return path


def _pad_rows(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Pad the batch with empty rows to a power of two, so that few shapes are compiled."""
    rows = len(batch["input_ids"])
    missing = next_power_of_two(rows) - rows
    return {name: np.pad(array, ((0, missing), (0, 0))) for name, array in batch.items()}
