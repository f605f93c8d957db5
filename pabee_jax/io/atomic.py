"""Atomic writes: a file is either complete or absent."""

import os
from collections.abc import Callable
from pathlib import PurePath
from typing import TypeVar

from pabee_jax.io import storage

Path = TypeVar("Path", bound=PurePath)


def temporary_of(path: Path) -> Path:
    """Return the path at which `path` is written before it is complete.

    If the process is killed, the temporary file may remain.
    """
    return path.with_name(f".{path.name}.tmp")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path and rename the written file to `path`."""
    if storage.is_remote(path):
        write(path)  # A bucket replaces an object only when the upload is complete.
        return
    write(temporary_of(path))
    os.replace(temporary_of(path), path)
