"""Files of a Hugging Face checkpoint: downloads them if needed, and reads three weight formats."""

import fnmatch
import json
import os
import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from pabee_jax.checkpoints.names import Tensors, from_flax_names
from pabee_jax.errors import InputError, first_line_of, shown
from pabee_jax.io import storage

# In order of preference; only the first format that a checkpoint has is downloaded and read.
_SAFETENSORS = "model.safetensors"
_FLAX = "flax_model.msgpack"
_TORCH = "pytorch_model.bin"
_FORMATS = (_SAFETENSORS, _FLAX, _TORCH)
# Where training programs keep the state_dict: Lightning, tutorials of PyTorch, DeepSpeed.
_STATE_KEYS = ("state_dict", "model_state_dict", "model", "module")
# The extensions of weight files that other programs write under names of their own.
_OTHER_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")
_HUB_TIMEOUT_SECONDS = 5
_SIDE_FILES = ("*.json", "vocab.txt", "merges.txt", "*.model")


def resolve(path_or_hub_id: str | os.PathLike, revision: str | None = None) -> Path:
    """Return the local directory of a checkpoint, downloaded if it is in a bucket or on the hub.

    Args:
        path_or_hub_id: the directory, or the name of a repository on the hub.
        revision: branch, tag or commit of the repository; None for its main branch.

    Raises:
        InputError: `path_or_hub_id` is neither a directory (local or `gs://`) nor a repository on
            the hub, the repository has no such revision, a revision is given for a directory, or
            the hub cannot be reached.
    """
    directory = storage.path_of(path_or_hub_id)
    if directory.is_dir():
        if revision is not None:
            raise InputError(
                f"revision is {revision!r}, but {path_or_hub_id} is a directory; only a repository "
                "on the hub has revisions"
            )
        return _from_bucket(directory) if storage.is_remote(directory) else Path(directory)
    if directory.exists():
        raise InputError(f"{path_or_hub_id} is a file; a checkpoint is a directory")
    # A hub id is "name" or "owner/name"; any other string is the path of a directory.
    if not isinstance(path_or_hub_id, str) or (
        path_or_hub_id.count("/") > 1 or path_or_hub_id.startswith((".", "/", "~"))
    ):
        raise InputError(f"there is no directory {path_or_hub_id}")
    if revision is not None and not (isinstance(revision, str) and revision):
        raise InputError(f"revision is {shown(revision)}; it must be a branch, a tag or a commit")
    return _download(path_or_hub_id, revision)


def read_tensors(directory: Path) -> Tensors:
    """Return the tensors of a checkpoint directory under PyTorch's names and layouts.

    Reads the first of these files that exists: `model.safetensors` (or its shards),
    `flax_model.msgpack`, or `pytorch_model.bin` (or its shards; requires PyTorch).

    Raises:
        InputError: the directory has no weights, a file is damaged, or PyTorch is not installed.
    """
    for name, read in _READERS.items():
        for files in (directory / name, directory / f"{name}.index.json"):
            if files.is_file():
                return _read(files, read)
    raise _no_weights([path.name for path in directory.iterdir()], directory)


def read_config_json(directory: Path | epath.Path) -> dict[str, Any]:
    """Return the values of a checkpoint directory's `config.json`.

    Raises:
        InputError: the file is missing or is not a JSON object.
    """
    path = directory / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{directory} is not a checkpoint: it has no config.json") from None
    except (ValueError, RecursionError) as error:  # Not JSON, or values that Python refuses.
        raise InputError(f"{path} is not JSON: {first_line_of(error)}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {storage.reason_of(error)}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} does not hold a JSON object")
    return values


def _read(path: Path, read: Callable[[Path], Tensors]) -> Tensors:
    if path.suffix != ".json":
        return _read_file(path, read)
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(map(str, weight_map.values())))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is not an index of weight files: {error}") from None
    outside = [shard for shard in shards if Path(shard).name != shard]
    if outside:
        raise InputError(
            f"{path} refers to {outside[0]!r}; a file of weights must be in the same directory"
        )
    missing = [shard for shard in shards if not (path.parent / shard).is_file()]
    if missing:
        raise InputError(f"{path} refers to {missing[0]}, which is missing")
    tensors = {}
    for shard in shards:
        tensors |= _read_file(path.parent / shard, read)
    return tensors


def _read_file(path: Path, read: Callable[[Path], Tensors]) -> Tensors:
    try:
        return read(path)
    except InputError:
        raise
    except Exception as error:  # The libraries raise different exceptions for a damaged file.
        raise InputError(
            f"{path} is damaged or not a weight file: {first_line_of(error)}"
        ) from None


def _read_safetensors(path: Path) -> Tensors:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _read_flax(path: Path) -> Tensors:
    from flax.serialization import msgpack_restore

    return dict(from_flax_names(msgpack_restore(path.read_bytes())))


def _read_torch(path: Path) -> Tensors:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            f"reading {path} needs PyTorch; install pabee_jax[torch], or convert the file to "
            "model.safetensors"
        ) from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(
            f"{path} is damaged, or holds other objects than tensors, which are not loaded because "
            "they can run code; save the tensors alone: torch.save(model.state_dict(), PATH)"
        ) from None
    while isinstance(state, Mapping) and (
        wrapper := next((key for key in _STATE_KEYS if isinstance(state.get(key), Mapping)), None)
    ):
        state = state[wrapper]
    tensors = {}
    for name, tensor in state.items() if isinstance(state, Mapping) else ():
        if isinstance(tensor, torch.Tensor):  # A state may have counters beside its tensors.
            is_float = tensor.is_floating_point()  # NumPy has no bfloat16.
            tensors[str(name)] = np.asarray((tensor.float() if is_float else tensor).detach())
    if not tensors:
        raise InputError(f"{path} holds no tensors; it must hold a model's state_dict")
    return tensors


_READERS: dict[str, Callable[[Path], Tensors]] = {
    _SAFETENSORS: _read_safetensors,
    _FLAX: _read_flax,
    _TORCH: _read_torch,
}


def _from_bucket(directory: epath.Path) -> Path:
    files = [path.name for path in directory.iterdir() if path.is_file()]
    patterns = _patterns(files, directory)
    matches = [name for name in files if any(fnmatch.fnmatch(name, glob) for glob in patterns)]
    return storage.download(directory, matches)


def _download(hub_id: str, revision: str | None) -> Path:
    """Download a checkpoint from the hub; without a network, return the cached directory.

    A listing of the repository decides which weight format is downloaded.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        files = _hub_files(hub_id, revision)
        patterns = _patterns(files, f"{hub_id} on the hub")
        return Path(
            huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=patterns)
        )
    except InputError:
        raise
    except errors.RevisionNotFoundError:
        raise InputError(f"{hub_id} on the hub has no revision {revision!r}") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise InputError(
            f"{hub_id} is neither a local directory nor a public model on the hub"
        ) from None
    except Exception:  # Without a network, the HTTP stack raises different exceptions.
        return _cached(hub_id, revision)


def _hub_files(hub_id: str, revision: str | None) -> list[str]:
    import huggingface_hub

    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise ConnectionError("offline mode")
    info = huggingface_hub.HfApi().model_info(
        hub_id, revision=revision, timeout=_HUB_TIMEOUT_SECONDS
    )
    return [sibling.rfilename for sibling in info.siblings or []]


def _patterns(files: list[str], source: object) -> list[str]:
    """Return glob patterns of the files to download: the weights in one format only."""
    weights = next((name for name in _FORMATS if _has_format(files, name)), None)
    if weights is None:
        raise _no_weights(files, source)
    return [*_SIDE_FILES, weights, f"{weights}.index.json", f"{Path(weights).stem}-*"]


def _no_weights(files: Iterable[str], source: object) -> InputError:
    others = sorted(name for name in files if name.endswith(_OTHER_WEIGHTS))
    remedy = ""
    if others:
        format = _SAFETENSORS if others[0].endswith(".safetensors") else _TORCH
        remedy = f"; if {others[0]} holds the weights, rename it to {format}"
    return InputError(f"{source} is not a checkpoint: it has none of {', '.join(_FORMATS)}{remedy}")


def _has_format(files: list[str], name: str) -> bool:
    return name in files or f"{name}.index.json" in files


def _cached(hub_id: str, revision: str | None) -> Path:
    import huggingface_hub

    try:
        directory = Path(
            huggingface_hub.snapshot_download(hub_id, revision=revision, local_files_only=True)
        )
        read_config_json(directory)
        return directory
    except Exception:
        raise InputError(
            f"{hub_id} is not a local directory, and the hub cannot be reached to download it; "
            "give the path of a local directory with config.json, model.safetensors and the "
            "tokenizer's files"
        ) from None
