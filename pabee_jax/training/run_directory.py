"""The directory of a run: its files, and the checks before a run writes to it."""

import contextlib
import dataclasses
import json
import os
import secrets
import time
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from flax import traverse_util

from pabee_jax.checkpoints.model_card import may_write
from pabee_jax.distributed import processes
from pabee_jax.errors import InputError
from pabee_jax.io import lock, storage
from pabee_jax.io.atomic import is_temporary, remove_temporaries, write_atomically
from pabee_jax.training.config import PLACES, TrainConfig
from pabee_jax.training.log import METRICS_FILE, TENSORBOARD

CONFIG_FILE = "train_config.json"
CHECKPOINTS = "checkpoints"
WEIGHTS_FILE = "model.safetensors"
# Hashes of the rows and parameters from which the run started.
_INPUTS_FILE = "train_inputs.json"
# Process 0 writes this file; the other processes read it to check that they share the directory.
_MARKER_FILE = ".started"
# Prefix of the folders with the results of other rows than the run's dev rows.
OTHER_RESULTS = "results"
# The files that a run and its evaluation write; --overwrite removes these files and no others.
_OWN_FILES = (
    _INPUTS_FILE,
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
    _MARKER_FILE,
    # Removed last: while this file exists, an interrupted removal can be repeated.
    CONFIG_FILE,
)
# Of a killed run, the temporary files of these files may remain.
_WRITTEN_BY_TRAINING = (CONFIG_FILE, _INPUTS_FILE, METRICS_FILE, "config.json", WEIGHTS_FILE)
# Prefixes of the fields that may change when a run is resumed: the number of devices may differ.
_MAY_CHANGE = ("mesh.",)
# On a network file system, a new file can take some seconds to appear on other machines.
_MARKER_TIMEOUT_S = 60


def check(workdir: epath.Path, config: TrainConfig, *, overwrite: bool) -> None:
    """Raise InputError if this run may not use `workdir`. Changes no file.

    Raises:
        InputError: `workdir` is the pretrained model, is a file, contains files but no run,
            contains a run with another config (allowed with `overwrite`), or `overwrite` would
            remove a link to a folder.
    """
    if config.model and _is_same_path(workdir, config.model):
        raise InputError(
            f"--workdir {workdir} is the pretrained model itself; choose another directory"
        )
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"--workdir {workdir} is a file; it must be a directory")
    # A run that was killed while it wrote its config leaves only such files.
    if not workdir.is_dir() or all(
        name == lock.LOCK_FILE or is_temporary(name, [CONFIG_FILE]) for name in _file_names(workdir)
    ):
        return
    if not (workdir / CONFIG_FILE).is_file():
        raise InputError(
            f"--workdir {workdir} is not empty and not a run directory (it has no {CONFIG_FILE}); "
            "choose another directory (nothing was removed)"
        )
    if overwrite:
        _refuse_linked_folders(workdir)
    elif has_parameters(workdir):
        _refuse_another_config(workdir, config)


def check_inputs(workdir: epath.Path, inputs: Mapping[str, str], *, overwrite: bool) -> None:
    """Raise InputError if `workdir` contains a run that was started from other inputs.

    Changes no file. `inputs` are the hashes of the rows and parameters from which the run starts.
    """
    if not overwrite and has_parameters(workdir):
        _refuse_other_inputs(workdir, inputs)


def is_finished(workdir: epath.Path) -> bool:
    """Return whether `workdir` contains a finished run, whose weights are written last."""
    return (workdir / CONFIG_FILE).is_file() and (workdir / WEIGHTS_FILE).is_file()


def locked(workdir: epath.Path) -> contextlib.AbstractContextManager[None]:
    """Create `workdir`, and keep other processes from training in it: see `pabee_jax.io.lock`."""
    return lock.locked(workdir, f"--workdir {workdir}", "trains in")


def prepare(
    workdir: epath.Path, config: TrainConfig, inputs: Mapping[str, str], *, overwrite: bool
) -> None:
    """Create `workdir` and write the config; with `overwrite`, first remove the previous run.

    Call `check` and `check_inputs` before, and hold the lock. `inputs` are written beside the
    config, and compared when the run is resumed.

    Raises:
        InputError: `workdir` cannot be written, or contains a run with another config or a run that
            was started from other rows or parameters.
    """
    # Another process may have started a run meanwhile.
    check(workdir, config, overwrite=overwrite)
    check_inputs(workdir, inputs, overwrite=overwrite)
    try:
        if overwrite:
            _clear(workdir)
        storage.make_folder(workdir)
        remove_temporaries(workdir, _WRITTEN_BY_TRAINING)
        text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
        write_atomically(workdir / CONFIG_FILE, lambda path: path.write_text(text))
        inputs_text = json.dumps(dict(inputs), indent=2) + "\n"
        write_atomically(workdir / _INPUTS_FILE, lambda path: path.write_text(inputs_text))
    except Exception as error:  # Buckets raise many types: absent, no permission, no network.
        reason = storage.reason_of(error)
        raise InputError(f"--workdir {workdir} cannot be written: {reason}") from None


def check_shared(workdir: epath.Path) -> None:
    """Raise InputError unless all processes share the `workdir` that process 0 has prepared.

    The call waits for all processes.

    Raises:
        InputError: a process cannot read the marker file that process 0 wrote.
    """
    if jax.process_count() == 1:
        return
    marker, token = workdir / _MARKER_FILE, secrets.token_hex(8)
    if processes.is_first():
        marker.write_text(token)
    token, *_ = processes.gather(token)
    deadline = time.monotonic() + _MARKER_TIMEOUT_S
    while not (is_shared := marker.is_file() and marker.read_text() == token):
        if time.monotonic() > deadline:
            break
        time.sleep(1)
    shared_by_process = processes.gather(is_shared)
    if processes.is_first():
        marker.unlink()
    if not all(shared_by_process):
        raise InputError(
            f"process {shared_by_process.index(False)} cannot read the file that process 0 wrote "
            f"to --workdir {workdir}; give a directory that all processes share, such as a gs:// "
            "address"
        )


def read_config(workdir: epath.Path) -> TrainConfig:
    """Return the config of the run in `workdir`.

    Raises:
        InputError: `train_config.json` is missing, or is not a valid config.
    """
    path = workdir / CONFIG_FILE
    try:
        return from_dict(TrainConfig, json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise InputError(
            f"{workdir} is not the directory of a run: it has no {CONFIG_FILE}, which names the "
            "task and its data"
        ) from None
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is not the config of a run: {error}") from None


def from_dict(kind: type, values: dict[str, Any]) -> Any:
    """Return a dataclass of type `kind`, with nested dataclasses, from JSON values.

    Raises:
        TypeError: an unknown field, or a value of the wrong type.
    """
    if not isinstance(values, dict):
        raise TypeError(f"{values!r} is not an object with the fields of {kind.__name__}")
    default, fields = kind(), {}
    for name, value in values.items():
        default_value = getattr(default, name, None)
        is_float = isinstance(default_value, float)
        if dataclasses.is_dataclass(default_value):
            value = from_dict(type(default_value), value)
        elif not isinstance(value, (int, float) if is_float else type(default_value)):
            raise TypeError(f"{name} is {value!r}, which is not a valid value")
        fields[name] = value
    return kind(**fields)


def _file_names(folder: epath.Path) -> set[str]:
    if not storage.is_remote(folder):
        return {path.name for path in folder.iterdir()}
    # A folder that a user created in a bucket is an object with an empty name.
    return {name for name in storage.objects(folder) if name}


def _is_same_path(workdir: epath.Path, model: str) -> bool:
    return storage.absolute(storage.path_of(model)) == storage.absolute(workdir)


def _refuse_linked_folders(workdir: epath.Path) -> None:
    """Raise InputError for a link to a folder, whose contents may belong to another run."""
    if storage.is_remote(workdir):
        return
    for name in _OWN_FILES:
        if (workdir / name).is_dir() and os.path.islink(workdir / name):
            raise InputError(
                f"{workdir / name} is a link to a folder, which --overwrite does not remove; "
                "remove the link, or choose another directory (nothing was removed)"
            )


def _clear(workdir: epath.Path) -> None:
    other_results = workdir.glob(f"{OTHER_RESULTS}-*")
    if may_write(workdir / "README.md"):  # The user's own README.md stays.
        (workdir / "README.md").unlink(missing_ok=True)
    for path in (*other_results, *(workdir / name for name in _OWN_FILES)):
        if path.is_dir():
            path.rmtree()
        else:
            path.unlink(missing_ok=True)


def has_parameters(workdir: epath.Path) -> bool:
    """Return whether the run in `workdir` has saved parameters; if not, it may be replaced."""
    checkpoints = workdir / CHECKPOINTS
    return is_finished(workdir) or (
        checkpoints.is_dir() and any(path.name.isdigit() for path in checkpoints.iterdir())
    )


def _refuse_other_inputs(workdir: epath.Path, inputs: Mapping[str, str]) -> None:
    try:
        stored = json.loads((workdir / _INPUTS_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:  # The run was begun by an earlier version.
        return
    except ValueError:
        raise InputError(f"{workdir / _INPUTS_FILE} is not JSON") from None
    for name, value in inputs.items():
        if stored.get(name) != value:
            raise InputError(
                f"--workdir {workdir} contains a run that was started from other {name}: restore "
                "them, choose another directory, or replace that run with --overwrite"
            )


def _refuse_another_config(workdir: epath.Path, config: TrainConfig) -> None:
    stored_fields, new_fields = (
        traverse_util.flatten_dict(dataclasses.asdict(fields), sep=".")
        for fields in (read_config(workdir), config)
    )
    for name, value in new_fields.items():
        stored = stored_fields[name]
        # The stored paths are those of process 0; other processes may use other paths.
        differs = stored != value and (processes.is_first() or name not in PLACES)
        if differs and not name.startswith(_MAY_CHANGE):
            raise InputError(
                f"--workdir {workdir} contains a run with another config ({name} is {stored!r} in "
                f"that run and {value!r} in this run); choose another directory, or replace that "
                "run with --overwrite"
            )
