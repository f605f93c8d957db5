"""Finds and reads a Hugging Face checkpoint's files: directory, bucket or hub; three formats."""

import fnmatch
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from pabee_jax.checkpoints.names import Tensors, from_flax_names
from pabee_jax.errors import InputError
from pabee_jax.io import storage

# In order of preference: one format is downloaded and read.
_SAFETENSORS = "model.safetensors"
_FLAX = "flax_model.msgpack"
_TORCH = "pytorch_model.bin"
_FORMATS = (_SAFETENSORS, _FLAX, _TORCH)
_HUB_TIMEOUT_SECONDS = 5
_SIDE_FILES = ("*.json", "vocab.txt", "spiece.model", "*.model")


def resolve(path_or_hub_id: str) -> Path:
    """The local directory of a checkpoint; what is in a bucket or on the hub is downloaded.

    Raises:
        InputError: neither a directory (local or `gs://`) nor a repository of the hub that can be
            reached.
    """
    directory = storage.path_of(path_or_hub_id)
    if directory.is_dir():
        return _from_bucket(directory) if storage.is_remote(directory) else Path(directory)
    if directory.exists():
        raise InputError(f"{path_or_hub_id} is a file; a checkpoint is a directory")
    # A hub id is "name" or "owner/name"; anything else can only have been meant as a directory.
    if path_or_hub_id.count("/") > 1 or path_or_hub_id.startswith((".", "/", "~")):
        raise InputError(f"there is no directory {path_or_hub_id}")
    return _download(path_or_hub_id)


def read_tensors(directory: Path) -> Tensors:
    """The tensors of a checkpoint directory under PyTorch's names and layouts.

    Reads `model.safetensors` (also sharded), `flax_model.msgpack` or `pytorch_model.bin` (also
    sharded; needs PyTorch), the first one that is there.

    Raises:
        InputError: no weights, a damaged file, or PyTorch missing.
    """
    for name, read in _READERS.items():
        for files in (directory / name, directory / f"{name}.index.json"):
            if files.is_file():
                return _read(files, read)
    raise InputError(f"{directory} is not a checkpoint: it has none of {', '.join(_FORMATS)}")


def read_config_json(directory: Path | epath.Path) -> dict[str, Any]:
    """The `config.json` of a checkpoint directory.

    Raises:
        InputError: the file is absent or is not a JSON object.
    """
    path = directory / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{directory} is not a checkpoint: it has no config.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} does not hold a JSON object")
    return values


def _read(path: Path, read: Callable[[Path], Tensors]) -> Tensors:
    if path.suffix != ".json":
        return _read_file(path, read)
    try:
        shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is not an index of weight files: {error}") from None
    missing = [shard for shard in shards if not (path.parent / shard).is_file()]
    if missing:
        raise InputError(f"{path} names {missing[0]}, which is not there")
    tensors = {}
    for shard in shards:
        tensors |= _read_file(path.parent / shard, read)
    return tensors


def _read_file(path: Path, read: Callable[[Path], Tensors]) -> Tensors:
    try:
        return read(path)
    except InputError:
        raise
    except Exception as error:  # Each format's library has its own exceptions for damage.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path} is damaged or not a weight file: {reason}") from None


def _read_safetensors(path: Path) -> Tensors:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _read_flax(path: Path) -> Tensors:
    from flax.serialization import msgpack_restore

    return dict(from_flax_names(msgpack_restore(path.read_bytes())))


def _read_torch(path: Path) -> Tensors:
    try:
        import torch
    except ImportError:
        raise InputError(
            f"reading {path} needs PyTorch: install pabee_jax[torch], or convert the file to "
            "model.safetensors"
        ) from None
    state = torch.load(path, map_location="cpu", weights_only=True)
    return {name: np.asarray(tensor.float().numpy()) for name, tensor in state.items()}


_READERS: dict[str, Callable[[Path], Tensors]] = {
    _SAFETENSORS: _read_safetensors,
    _FLAX: _read_flax,
    _TORCH: _read_torch,
}


def _from_bucket(directory: epath.Path) -> Path:
    files = [path.name for path in directory.iterdir() if path.is_file()]
    patterns = _patterns(files, directory)
    chosen = [name for name in files if any(fnmatch.fnmatch(name, each) for each in patterns)]
    return storage.downloaded(directory, chosen)


def _download(hub_id: str) -> Path:
    """One listing to choose the weight format, one download; without a network, the cache."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        files = _hub_files(hub_id)
        patterns = _patterns(files, f"{hub_id} on the hub")
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns))
    except InputError:
        raise
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise InputError(
            f"{hub_id} is neither a directory here nor a public model of the hub"
        ) from None
    except Exception:  # Whatever the HTTP stack raises without a network; the cache may still do.
        return _cached(hub_id)


def _hub_files(hub_id: str) -> list[str]:
    import huggingface_hub

    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise ConnectionError("offline mode")
    info = huggingface_hub.HfApi().model_info(hub_id, timeout=_HUB_TIMEOUT_SECONDS)
    return [sibling.rfilename for sibling in info.siblings or []]


def _patterns(files: list[str], where: object) -> list[str]:
    """The files of a checkpoint that are worth downloading: the weights in one format only."""
    chosen = next((name for name in _FORMATS if _has_format(files, name)), None)
    if chosen is None:
        raise InputError(f"{where} is not a checkpoint: it has none of {', '.join(_FORMATS)}")
    return [*_SIDE_FILES, chosen, f"{chosen}.index.json", f"{Path(chosen).stem}-*"]


def _has_format(files: list[str], name: str) -> bool:
    return name in files or f"{name}.index.json" in files


def _cached(hub_id: str) -> Path:
    import huggingface_hub

    try:
        directory = Path(huggingface_hub.snapshot_download(hub_id, local_files_only=True))
        read_config_json(directory)
        return directory
    except Exception:
        raise InputError(
            f"{hub_id} is not a directory here, and the hub cannot be reached to download it: "
            "give the path of a local directory with config.json, model.safetensors and the "
            "tokenizer's files"
        ) from None
