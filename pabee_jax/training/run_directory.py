"""The folder of a run: what is in it, and whether this run may use it."""

import dataclasses
import json
import secrets
import time
from typing import Any

import jax
from etils import epath
from flax import traverse_util

from pabee_jax.distributed import processes
from pabee_jax.errors import InputError
from pabee_jax.io import storage
from pabee_jax.io.atomic import temporary_of, write_atomically
from pabee_jax.training.config import PLACES, TrainConfig
from pabee_jax.training.log import METRICS_FILE, TENSORBOARD

CONFIG_FILE = "train_config.json"
CHECKPOINTS = "checkpoints"
WEIGHTS_FILE = "model.safetensors"
# What the last attempt to start wrote there, while it looks whether all processes see it.
_MARK = ".started"
# What a run and its evaluation write; --overwrite removes these and nothing else.
_OWN_FILES = (
    METRICS_FILE,
    CHECKPOINTS,
    WEIGHTS_FILE,
    TENSORBOARD,
    "results.json",
    "results.csv",
    "tradeoff.png",
    "predictions.csv",
    "all_exit_logits.npz",
    "sweep.json",
    "sweep.csv",
    "sweep.png",
    "report.html",
    "perturbed.json",
    "perturbed.csv",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "spiece.model",
    _MARK,
    CONFIG_FILE,  # Last: while it is there, a removal that was cut short can be repeated.
)
# A run may go on with another number of devices.
_MAY_CHANGE = ("mesh.",)
# Network file systems show a new file late.
_SEEN_WITHIN_S = 60


def check(workdir: epath.Path, config: TrainConfig, *, overwrite: bool) -> None:
    """Refuses, before anything is loaded, a folder that this run may not use. Changes nothing.

    Raises:
        InputError: the folder holds another run or somebody else's files.
    """
    if config.model and _is(workdir, config.model):
        raise InputError(f"--workdir {workdir} is the pretrained model itself; choose another one")
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"--workdir {workdir} is a file; it must be a directory")
    # A run that was killed in its first moment leaves this file and nothing else.
    if not workdir.is_dir() or _names(workdir) <= {temporary_of(workdir / CONFIG_FILE).name}:
        return
    if not (workdir / CONFIG_FILE).is_file():
        raise InputError(
            f"--workdir {workdir} holds files that are not a run's; choose another (nothing was "
            "removed)"
        )
    if not overwrite:
        _refuse_another_config(workdir, config)


def prepare(workdir: epath.Path, config: TrainConfig, *, overwrite: bool) -> None:
    """Makes a folder that was checked ready for a fresh run or for going on with the same run.

    Raises:
        InputError: it cannot be written.
    """
    try:
        if overwrite:
            _clear(workdir)
        storage.make_folder(workdir)
        text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
        write_atomically(workdir / CONFIG_FILE, lambda path: path.write_text(text))
    except Exception as error:  # A bucket has its own: no such bucket, no permission, no network.
        reason = storage.reason_of(error)
        raise InputError(f"--workdir {workdir} cannot be written: {reason}") from None


def check_shared(workdir: epath.Path) -> None:
    """Whether every process sees the folder that the first one has prepared; waits for all.

    Raises:
        InputError: one does not.
    """
    if jax.process_count() == 1:
        return
    mark, token = workdir / _MARK, secrets.token_hex(8)
    if processes.is_first():
        mark.write_text(token)
    token, *_ = processes.gathered(token)
    patience = time.monotonic() + _SEEN_WITHIN_S
    while not (seen := mark.is_file() and mark.read_text() == token):
        if time.monotonic() > patience:
            break
        time.sleep(1)
    found = processes.gathered(seen)
    if processes.is_first():
        mark.unlink()
    if not all(found):
        raise InputError(
            f"process {found.index(False)} does not see what process 0 wrote into --workdir "
            f"{workdir}: give a place that all processes share, such as a gs:// address"
        )


def read_config(workdir: epath.Path) -> TrainConfig:
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
    """A (nested) dataclass from JSON values; an unknown field or a wrong type is a TypeError."""
    if not isinstance(values, dict):
        raise TypeError(f"{values!r} stands where {kind.__name__} should")
    default, fields = kind(), {}
    for name, value in values.items():
        old = getattr(default, name, None)
        if dataclasses.is_dataclass(old):
            value = from_dict(type(old), value)
        elif not isinstance(value, (int, float) if isinstance(old, float) else type(old)):
            raise TypeError(f"{name} is {value!r}")
        fields[name] = value
    return kind(**fields)


def _names(folder: epath.Path) -> set[str]:
    if not storage.is_remote(folder):
        return {path.name for path in folder.iterdir()}
    # A folder that was made by hand is an object without a name of its own.
    return {name for name in storage.objects(folder) if name}


def _is(workdir: epath.Path, model: str) -> bool:
    return storage.absolute(storage.path_of(model)) == storage.absolute(workdir)


def _clear(workdir: epath.Path) -> None:
    for name in _OWN_FILES:
        path = workdir / name
        if path.is_dir():
            path.rmtree()
        else:
            path.unlink(missing_ok=True)


def _refuse_another_config(workdir: epath.Path, config: TrainConfig) -> None:
    theirs, ours = (
        traverse_util.flatten_dict(dataclasses.asdict(one), sep=".")
        for one in (read_config(workdir), config)
    )
    for name, value in ours.items():
        # The first process wrote where its own copies are.
        differs = theirs[name] != value and (processes.is_first() or name not in PLACES)
        if differs and not name.startswith(_MAY_CHANGE):
            raise InputError(
                f"--workdir {workdir} holds a run with another config ({name} is {theirs[name]!r} "
                f"there and {value!r} here); choose another, or --overwrite to replace it"
            )
