"""Where runs and checkpoints lie: on this machine's disk, or in a bucket (`gs://`).

Run folders and checkpoints go through `etils.epath`, whose paths read like pathlib's.
What a bucket cannot do, appending and being read by libraries that want a file name, is done in a
folder of this machine that is copied there.
"""

import atexit
import contextlib
import errno
import importlib.util
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from typing import Any

import fsspec
from etils import epath
from fsspec.config import conf

from pabee_jax.errors import InputError

_BUCKET = "gs://"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_ALLOWED = (errno.EROFS, errno.EACCES, errno.EPERM)


def path_of(name: str | os.PathLike) -> epath.Path:
    """The path that a user wrote: `gs://BUCKET/...`, or a local one, in which `~` is expanded.

    Raises:
        InputError: another kind of address, gcsfs is missing, or the bucket is out of reach.
    """
    text = _address(name)
    scheme, separator, _ = text.partition("://")
    if not separator:
        return epath.Path(text).expanduser()
    if scheme != "gs":
        raise InputError(f"{text}: give a local path or a gs:// address; {scheme}:// is not known")
    if importlib.util.find_spec("gcsfs") is None:
        raise InputError(f"{text}: gs:// addresses need gcsfs: install pabee_jax[gcs]")
    # Listings are kept for ever otherwise, and other processes and libraries write there as well.
    conf.setdefault("gcs", {})["use_listings_cache"] = False
    path = epath.Path(text)
    try:
        path.exists()
    except Exception as error:  # No network, no permission: each library has its own.
        raise InputError(f"{text} cannot be reached: {reason_of(error)}") from None
    return path


def local_path_of(name: str | os.PathLike) -> pathlib.Path:
    """The same for what can only be on this machine's disk.

    Raises:
        InputError: an address.
    """
    if "://" in (text := _address(name)):
        raise InputError(f"{text}: a local path is needed here, not an address")
    return pathlib.Path(name).expanduser()


def _address(name: str | os.PathLike) -> str:
    # pathlib takes one of the two slashes.
    return re.sub(r"^gs:/(?!/)", _BUCKET, os.fspath(name))


def is_remote(path: os.PathLike) -> bool:
    """Whether it is in a bucket."""
    return os.fspath(path).startswith(_BUCKET)


def absolute(path: epath.Path) -> epath.Path:
    """Independent of the working directory and of links."""
    return path if is_remote(path) else epath.Path(os.path.realpath(path))


def make_folder(path: epath.Path) -> None:
    """Makes it and those above it; a bucket has no folders, and is never made."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def local_folder(folder: epath.Path) -> Iterator[pathlib.Path]:
    """A folder of this machine whose files are in `folder` once the block has ended.

    Raises:
        InputError: they cannot be copied to the bucket; they are kept on this machine.
    """
    if not is_remote(folder):
        make_folder(folder)
        yield pathlib.Path(folder)
        return
    place = pathlib.Path(tempfile.mkdtemp())
    try:
        yield place
    except BaseException:
        shutil.rmtree(place)
        raise
    try:
        upload(place, folder)
    except Exception as error:
        raise InputError(
            f"{folder} cannot be written: {reason_of(error)}; the files are in {place}"
        ) from None
    shutil.rmtree(place)


def upload(source: pathlib.Path, folder: epath.Path) -> None:
    """Copies the files in `source` and below to a bucket, in the order in which they were written.

    What was there is replaced, each file at once.
    """
    files = [path for path in source.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: path.stat().st_mtime_ns):
        _copy(path, folder / path.relative_to(source))


def downloaded(folder: epath.Path, names: Collection[str]) -> pathlib.Path:
    """A folder of this machine, kept until the process ends, with these files of `folder`."""
    place = pathlib.Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    for name in names:
        _copy(folder / name, place / name)
    return place


def _copy(source: pathlib.Path | epath.Path, target: pathlib.Path | epath.Path) -> None:
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 24)


def objects(folder: epath.Path) -> dict[str, dict[str, Any]]:
    """What a bucket knows of the objects in `folder` and below it, by name in `folder`."""
    found = fsspec.filesystem("gcs").find(os.fspath(folder), detail=True)
    start = len(os.fspath(folder).removeprefix(_BUCKET)) + 1
    return {name[start:]: about for name, about in found.items()}


def reason_of(error: Exception) -> str:
    """What went wrong, in a line: in the operating system's words, or as the error says it."""
    line, *_ = str(error).strip().splitlines() or ["no reason given"]
    told = f"{type(error).__name__}: {line}"
    return refusal(error) or getattr(error, "strerror", None) or told


def refusal(error: Exception) -> str | None:
    """What the operating system refused: a full disk, no permission; None if it was not that.

    safetensors and tensorstore tell it only in their text.
    """
    for code in (*_DISK_FULL, *_NOT_ALLOWED):
        if getattr(error, "errno", None) == code or os.strerror(code) in str(error):
            return os.strerror(code)
    return None
