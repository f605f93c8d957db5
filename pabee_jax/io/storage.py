"""Storage of runs and checkpoints: the local disk, or a bucket (`gs://`).

Run folders and checkpoints are accessed through `etils.epath`, whose paths have pathlib's methods.
A bucket has no append, and some libraries read or write local files only. For these cases, this
module uses a local folder and copies files between the folder and the bucket.
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

from pabee_jax.errors import InputError, shown

_BUCKET = "gs://"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_ALLOWED = (errno.EROFS, errno.EACCES, errno.EPERM)
# Linux and macOS allow 255 bytes per name. Linux allows 4096 bytes per path; a run needs about 300
# of them for the files of its checkpoints.
_LONGEST_NAME, _LONGEST_PATH = 255, 3_500


def path_of(name: str | os.PathLike) -> epath.Path:
    """Return the path that a user gave: `gs://BUCKET/...`, or a local path with `~` expanded.

    Raises:
        InputError: no file system can hold the path, the address has another scheme, gcsfs is not
            installed, or the bucket cannot be reached.
    """
    text = _address(name)
    scheme, separator, _ = text.partition("://")
    if not separator:
        return epath.Path(_expanded(text))
    if scheme != "gs":
        raise InputError(
            f"{text}: {scheme}:// is not supported; give a local path or a gs:// address"
        )
    if importlib.util.find_spec("gcsfs") is None:
        raise InputError(f"{text}: gs:// addresses need gcsfs; install pabee_jax[gcs]")
    # gcsfs caches listings without expiry, but other processes and libraries write to the bucket.
    conf.setdefault("gcs", {})["use_listings_cache"] = False
    path = epath.Path(text)
    try:
        path.exists()
    except Exception as error:  # Libraries raise different exceptions for network and permissions.
        raise InputError(f"{text} cannot be reached: {reason_of(error)}") from None
    return path


def local_path_of(name: str | os.PathLike) -> pathlib.Path:
    """Return the local path that a user gave, with `~` expanded.

    Raises:
        InputError: no file system can hold the path, or `name` is an address, such as
            `gs://BUCKET/...`.
    """
    if "://" in (text := _address(name)):
        raise InputError(f"{text} is an address; a local path is required")
    return _expanded(text)


def _address(name: str | os.PathLike) -> str:
    """Return the text of a path that can be printed and stored.

    Raises:
        InputError: `name` is not a path, or the path is empty, contains a NUL, or is not UTF-8.
    """
    if not isinstance(name, str | os.PathLike):
        raise InputError(f"a path is {shown(name)}; it must be a string or a pathlib.Path")
    # pathlib merges the two slashes of an address.
    text = re.sub(r"^gs:/(?!/)", _BUCKET, os.fspath(name))
    if not text:
        raise InputError("a path is empty; give a file or a directory")
    if problem := unusable_text(text):
        raise InputError(f"the path {text[:100]!r} {problem}; choose another name")
    return text


def unusable_text(text: str) -> str | None:
    """Describe why no path and no name in a file can be `text`; return None if it can."""
    if "\0" in text:
        return "contains a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:  # Python's way to hold bytes that are not UTF-8.
        return "is not UTF-8"
    return None


def _expanded(text: str) -> pathlib.Path:
    """Return the local path with `~` expanded.

    Raises:
        InputError: there is no such user, or the path is too long.
    """
    try:
        path = pathlib.Path(text).expanduser()
    except RuntimeError as error:  # "~nosuchuser/runs"
        raise InputError(f"{text}: {error}") from None
    longest_name = max(len(os.fsencode(part)) for part in ("", *path.parts))
    length = len(os.fsencode(path.absolute()))
    if longest_name > _LONGEST_NAME or length > _LONGEST_PATH:
        raise InputError(
            f"the path {text[:100]}... is too long: its longest name has {longest_name} bytes and "
            f"the whole path has {length}; at most {_LONGEST_NAME} and {_LONGEST_PATH} are allowed"
        )
    return path


def is_remote(path: os.PathLike) -> bool:
    """Return whether the path is in a bucket."""
    return os.fspath(path).startswith(_BUCKET)


def absolute(path: epath.Path) -> epath.Path:
    """Return the path made independent of the working directory and of symbolic links."""
    return path if is_remote(path) else epath.Path(os.path.realpath(path))


def make_folder(path: epath.Path) -> None:
    """Create the folder and its parents; for a path in a bucket, do nothing.

    A bucket has no folders. The bucket itself is never created.
    """
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def local_folder(folder: epath.Path) -> Iterator[pathlib.Path]:
    """Yield a local folder whose files are in `folder` after the `with` block.

    If `folder` is in a bucket, the files are uploaded at the end of the block.

    Raises:
        InputError: the upload failed; the message names the local folder, which is not deleted.
    """
    if not is_remote(folder):
        make_folder(folder)
        yield pathlib.Path(folder)
        return
    local = pathlib.Path(tempfile.mkdtemp())
    try:
        yield local
    except BaseException:
        shutil.rmtree(local)
        raise
    try:
        upload(local, folder)
    except Exception as error:
        raise InputError(
            f"{folder} cannot be written: {reason_of(error)}; the files are in {local}"
        ) from None
    shutil.rmtree(local)


@contextlib.contextmanager
def new_folder(folder: epath.Path) -> Iterator[pathlib.Path]:
    """Yield a local folder that becomes `folder` after the `with` block: whole, or not at all.

    Raises:
        InputError: `folder` cannot be created, or as `local_folder`.
    """
    if is_remote(folder):
        with local_folder(folder) as local:
            yield local
        return
    path = pathlib.Path(folder).absolute()
    existing = next(parent for parent in path.parents if parent.exists())
    try:
        scratch = pathlib.Path(tempfile.mkdtemp(prefix=".pabee_jax.", dir=existing))
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {reason_of(error)}") from None
    try:
        new = scratch / "new"  # `mkdtemp` gives its folder to its owner only.
        new.mkdir()
        yield new
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            new.rename(path)
        except OSError as error:
            raise InputError(f"{folder} cannot be written: {reason_of(error)}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def upload(source: pathlib.Path, folder: epath.Path) -> None:
    """Copy all files below `source` to a bucket, in the order of their modification times.

    Each existing object is replaced atomically.
    """
    files = [path for path in source.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: path.stat().st_mtime_ns):
        _copy(path, folder / path.relative_to(source))


def download(folder: epath.Path, names: Collection[str]) -> pathlib.Path:
    """Return a local folder with copies of these files of `folder`.

    The local folder is deleted when the process ends.
    """
    local = pathlib.Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, local, ignore_errors=True)
    for name in names:
        _copy(folder / name, local / name)
    return local


def _copy(source: pathlib.Path | epath.Path, target: pathlib.Path | epath.Path) -> None:
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 24)


def objects(folder: epath.Path) -> dict[str, dict[str, Any]]:
    """Return the metadata of all objects below `folder` in a bucket, by name relative to it."""
    metadata = fsspec.filesystem("gcs").find(os.fspath(folder), detail=True)
    start = len(os.fspath(folder).removeprefix(_BUCKET)) + 1
    return {name[start:]: values for name, values in metadata.items()}


def reason_of(error: Exception) -> str:
    """Return the reason for an error in one line.

    The reason is the operating system's message or, without an error number, the exception's class
    and the first line of its message.
    """
    line, *_ = str(error).strip().splitlines() or ["no reason given"]
    description = f"{type(error).__name__}: {line}"
    return refusal(error) or getattr(error, "strerror", None) or description


def refusal(error: Exception) -> str | None:
    """Return the operating system's message if a write failed for lack of space or permission.

    Return None for other errors. The text of the error is searched too, because the errors of
    safetensors and tensorstore have no error number.
    """
    for code in (*_DISK_FULL, *_NOT_ALLOWED):
        if getattr(error, "errno", None) == code or os.strerror(code) in str(error):
            return os.strerror(code)
    return None
