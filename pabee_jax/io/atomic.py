"""Atomic writes: a file is either complete or absent, also after a power cut."""

import errno
import os
import secrets
from collections.abc import Callable, Collection
from pathlib import Path, PurePath
from typing import TypeVar

from pabee_jax.io import storage

AnyPath = TypeVar("AnyPath", bound=PurePath)
_SUFFIX = ".tmp"


def write_atomically(path: AnyPath, write: Callable[[AnyPath], object]) -> None:
    """Call `write` with a temporary path and rename the written file to `path`.

    The temporary path is in the folder of `path` and differs in every call, so that processes that
    write the same file do not write to the same temporary file. If `write` raises, the temporary
    file is removed. If the process is killed, the temporary file remains (`remove_temporaries`).
    """
    if storage.is_remote(path):
        write(path)  # A bucket replaces an object only when the upload is complete.
        return
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_SUFFIX}")
    try:
        write(temporary)
        # Without this, a file system may store the new name before the contents.
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _store_names(path.parent)


def is_temporary(name: str, final_names: Collection[str]) -> bool:
    """Return whether `name` is a temporary file of one of the files named `final_names`."""
    return name.endswith(_SUFFIX) and any(name.startswith(f".{final}.") for final in final_names)


def remove_temporaries(folder: PurePath, final_names: Collection[str]) -> None:
    """Remove the temporary files that killed processes left in `folder`.

    No process may write the files named `final_names` meanwhile.
    """
    if storage.is_remote(folder):
        return
    for path in Path(folder).iterdir():
        if is_temporary(path.name, final_names):
            path.unlink(missing_ok=True)


def _store_names(folder: PurePath) -> None:
    """Wait until the disk has stored the names in `folder`, such as that of a renamed file."""
    if os.name == "nt":  # Windows cannot open a folder.
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # Some file systems cannot do this.
            raise
    finally:
        os.close(descriptor)
