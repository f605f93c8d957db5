"""The folder of a run: what is in it, and whether this run may use it."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from pabee_jax.errors import InputError
from pabee_jax.training.config import TrainConfig

CONFIG_FILE = "train_config.json"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
WEIGHTS_FILE = "model.safetensors"
# What a run writes; --overwrite removes these and nothing else.
_OWN_FILES = (
    CONFIG_FILE,
    METRICS_FILE,
    CHECKPOINTS,
    WEIGHTS_FILE,
    "tensorboard",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "spiece.model",
)
# A run may go on with another number of devices.
_MAY_CHANGE = ("mesh",)


def prepare(workdir: Path, config: TrainConfig, *, overwrite: bool) -> None:
    """Makes the folder ready for a fresh run or for going on with the same run.

    Raises:
        InputError: the folder holds another run or somebody else's files, or cannot be written.
    """
    if config.model and Path(config.model).expanduser().absolute() == workdir.absolute():
        raise InputError(f"--workdir {workdir} is the pretrained model itself; choose another one")
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"--workdir {workdir} is a file; it must be a directory")
    if overwrite:
        _clear(workdir)
    _refuse_other_contents(workdir, config)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        temporary = workdir / f".{CONFIG_FILE}.tmp"
        temporary.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
        os.replace(temporary, workdir / CONFIG_FILE)
    except OSError as error:
        raise InputError(f"--workdir {workdir} cannot be written: {error.strerror}") from None


def read_config(workdir: Path) -> TrainConfig:
    """The configuration with which a run directory was trained.

    Raises:
        InputError: there is none, or it is not one.
    """
    path = workdir / CONFIG_FILE
    try:
        return from_dict(TrainConfig, json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise InputError(
            f"{workdir} has no {CONFIG_FILE}, so it does not say which data it is for: give "
            "--config configs/glue.py:TASK"
        ) from None
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is not a run's configuration: {error}") from None


def from_dict(kind: type, values: dict[str, Any]) -> Any:
    """A (nested) dataclass from JSON values; an unknown field is a TypeError."""
    nested = {field.name: field.type for field in dataclasses.fields(kind)}
    return kind(
        **{
            name: from_dict(nested[name], value) if isinstance(value, dict) else value
            for name, value in values.items()
        }
    )


def _clear(workdir: Path) -> None:
    if workdir.is_dir() and any(workdir.iterdir()) and not (workdir / CONFIG_FILE).is_file():
        raise InputError(
            f"--overwrite: {workdir} is not a run directory (it has no {CONFIG_FILE}); nothing "
            "was removed"
        )
    for name in _OWN_FILES:
        path = workdir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _refuse_other_contents(workdir: Path, config: TrainConfig) -> None:
    if not workdir.is_dir() or not any(workdir.iterdir()):
        return
    if not (workdir / CONFIG_FILE).is_file():
        raise InputError(f"--workdir {workdir} holds files that are not a run's; choose another")
    theirs, ours = dataclasses.asdict(read_config(workdir)), dataclasses.asdict(config)
    different = [
        name for name in ours if ours[name] != theirs.get(name) and name not in _MAY_CHANGE
    ]
    if different:
        name = different[0]
        raise InputError(
            f"--workdir {workdir} holds a run with another config ({name} is {theirs.get(name)!r} "
            f"there and {ours[name]!r} here); choose another, or --overwrite to replace it"
        )
