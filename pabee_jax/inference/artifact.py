"""Runs what `pabee_jax.export` wrote: tokens in, predictions out, without the model's code.

The layers, the criterion and the exit are inside the serialised program; here are only its inputs,
its outputs and the checks that it cannot make itself.
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
from pabee_jax.errors import InputError
from pabee_jax.inference import planning
from pabee_jax.inference.inputs import Tokens, checked_tokens
from pabee_jax.inference.predictions import Predictions, predictions_of
from pabee_jax.io import storage

FORMAT = 1  # Of the directory: its files, and the program's inputs and outputs.
ARTIFACT_FILE = "artifact.json"
PROGRAM_FILE = "artifact.program"
WEIGHTS_FILE = "artifact.safetensors"
TOKENS = ("input_ids", "attention_mask", "token_type_ids")


@dataclasses.dataclass(frozen=True)
class Artifact:
    """What `artifact.json` says about a program.

    Attributes:
        platforms: where it runs: "cpu", "cuda", "rocm", "tpu".
        sequence_length: tokens per row, a constant of the program.
        dtype: compute type of the encoder, "float32" or "bfloat16".
        num_labels: width C of the logits; 1 means regression.
        num_layers: the largest exit layer.
        label_names: class names by class id; empty for regression.
        criterion: the one that `predict` uses when it gets none. Its class is part of the program,
            its values are not.
        jax_version: of the jax that wrote the program.
        sha256: hexadecimal digest by file name.
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
    jax_version: str
    sha256: dict[str, str]

    def to_json(self) -> str:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values |= {"format": FORMAT, "criterion": to_config(self.criterion)}
        values["sha256_of_this"] = _digest_of(values)
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    @classmethod
    def read(cls, directory: Path) -> "Artifact":
        """Raises InputError when the file is absent, damaged, or of another format version."""
        path = directory / ARTIFACT_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(
                f"{directory} holds no exported program: it has no {ARTIFACT_FILE}, which "
                "`python -m pabee_jax.export` writes last"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is damaged: it is not JSON ({error})") from None
        if not isinstance(values, dict) or "format" not in values:
            raise InputError(f"{path} is damaged: it says no format version")
        if values["format"] != FORMAT:
            raise InputError(
                f"{path} has format version {values['format']!r}, but this pabee_jax reads {FORMAT}"
            )
        if values.pop("sha256_of_this", None) != _digest_of(values):
            raise InputError(f"{path} is damaged: its values are not those that were written")
        kinds = get_type_hints(cls).items()
        return cls(**{name: _value(path, name, kind, values) for name, kind in kinds})


def _digest_of(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _value(path: Path, name: str, kind: Any, values: Mapping[str, Any]) -> Any:
    value = values.get(name)
    if name == "criterion" and isinstance(value, dict):
        return from_config(value)
    if isinstance(value, list):
        value = tuple(value)
    if not isinstance(value, get_origin(kind) or kind):
        raise InputError(f"{path} is damaged: {name} is {value!r}")
    return value


def thresholds(criterion: ExitCriterion) -> dict[str, np.ndarray]:
    """The criterion's values as the program takes them: `jax.export` refuses our own classes."""
    return dict(vars(as_arrays(criterion)))


def require_flatbuffers() -> None:
    """Raises InputError when the package with which jax reads and writes programs is not there."""
    try:
        importlib.import_module("flatbuffers")
    except ImportError:
        raise InputError(
            "exported programs need the package flatbuffers: pip install 'pabee_jax[export]'"
        ) from None


class ExportedClassifier:
    """A serialised early-exit program with its weights on the default device.

    Attributes:
        artifact: what is known about the program.
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
        """Predicts tokenised rows.

        Args:
            tokens: `input_ids` and optionally `attention_mask` and `token_type_ids`, each
                (N, sequence_length) int: padded, with a mask.
            criterion: of the exported one's class, with any values: none needs a new program.
                Absent, the exported one.
            batch_size: rows that run together until the last of them has left. Fewer are filled up
                to a power of two with empty rows, which nothing waits for.

        Raises:
            InputError: another sequence length, token ids that the model does not have, another
                class of criterion, or a batch size below 1.
        """
        planning.check_size("batch_size", batch_size)
        values = thresholds(self._checked_criterion(criterion))
        arrays = self._checked_tokens(tokens)
        found = []
        for start in range(0, len(arrays["input_ids"]), batch_size):
            rows = {name: each[start : start + batch_size] for name, each in arrays.items()}
            found.append((len(rows["input_ids"]), self._run(self._weights, _filled(rows), values)))
        # Only now, so that the device has its next batch while this one's answer is fetched.
        exits, logits = zip(
            *[(exits[:count], logits[:count]) for count, (exits, logits) in jax.device_get(found)],
            strict=True,
        )
        logits = np.concatenate(logits)
        names = self.artifact.label_names
        return Predictions(predictions_of(logits), logits, np.concatenate(exits), names)

    def _checked_criterion(self, criterion: ExitCriterion | None) -> ExitCriterion:
        exported = self.artifact.criterion
        criterion = exported if criterion is None else criterion
        if type(criterion) is not type(exported):
            raise InputError(
                f"this program was exported with the exit criterion {type(exported).__name__} and "
                f"takes no other: {criterion!r}"
            )
        check(criterion, self.artifact.num_labels == 1)
        warn(criterion, self.artifact.num_layers, self.artifact.num_labels == 1)
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
                f"input_ids has {columns} columns, but this program was exported for {length}: "
                "pad or cut the rows, with a mask"
            )
        return {name: getattr(dataset, name).astype(np.int32) for name in TOKENS}


def load(directory: str | Path) -> ExportedClassifier:
    """Reads an exported program and its weights, and puts the weights on the default device.

    Raises:
        InputError: not an exported program, a file that is missing or damaged, another format
            version, a program for other platforms or of a jax that this one cannot read, or
            flatbuffers is not installed.
    """
    directory = storage.local_path_of(directory)
    artifact = Artifact.read(directory)
    require_flatbuffers()
    platform = jax_export.default_export_platform()
    if platform not in artifact.platforms:
        raise InputError(
            f"{directory} was exported for {', '.join(artifact.platforms)}, but this process "
            f"computes on {platform}: export it again with --platforms {platform}"
        )
    program, weights = (
        _verified(directory / name, artifact) for name in (PROGRAM_FILE, WEIGHTS_FILE)
    )
    try:
        exported = jax_export.deserialize(bytearray(program.read_bytes()))
    except Exception as error:  # What a reader of another version stumbles over is not specified.
        raise InputError(
            f"jax {jax.__version__} cannot read {program}, which jax {artifact.jax_version} wrote: "
            f"export it again ({error})"
        ) from None
    return ExportedClassifier(artifact, exported, load_file(weights))


def _verified(path: Path, artifact: Artifact) -> Path:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise InputError(f"{path} is missing: export the program again") from None
    if digest != artifact.sha256.get(path.name):
        raise InputError(f"{path} is damaged: its sha256 is not the one in {ARTIFACT_FILE}")
    return path


def _filled(rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With empty rows up to a power of two, so that few shapes are compiled."""
    count = len(rows["input_ids"])
    missing = next_power_of_two(count) - count
    return {name: np.pad(each, ((0, missing), (0, 0))) for name, each in rows.items()}
