"""Files that are either complete or not there."""

import os
from collections.abc import Callable
from pathlib import Path


def temporary_of(path: Path) -> Path:
    """Where `path` is written before it is complete; a kill may leave it behind."""
    return path.with_name(f".{path.name}.tmp")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary path and renames the result to `path`."""
    write(temporary_of(path))
    os.replace(temporary_of(path), path)
