"""Files that are either complete or not there."""

import os
from collections.abc import Callable
from pathlib import PurePath
from typing import TypeVar

from pabee_jax.io import storage

Path = TypeVar("Path", bound=PurePath)


def temporary_of(path: Path) -> Path:
    """Where `path` is written before it is complete; a kill may leave it behind."""
    return path.with_name(f".{path.name}.tmp")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary path and renames the result to `path`."""
    if storage.is_remote(path):
        write(path)  # What a bucket shows of a name is what was last written to it as a whole.
        return
    write(temporary_of(path))
    os.replace(temporary_of(path), path)
