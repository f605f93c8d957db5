"""Whether the files of a folder are still those that were written there."""

import hashlib
import json
from pathlib import Path

from pabee_jax.atomic import write_atomically

_FILE = "digests.json"


def write(folder: Path) -> None:
    """Leaves the size and SHA-256 of every file in `folder` beside them."""
    found = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in _files(folder)
    }
    text = json.dumps(found, indent=1) + "\n"
    write_atomically(folder / _FILE, lambda path: path.write_text(text))


def problem(folder: Path) -> str | None:
    """The first file that is not as it was written, in words; None if all are.

    A folder without digests (a kill came between the two, or an older version wrote it) is taken to
    be good.
    """
    path = folder / _FILE
    if not path.exists():
        return None
    try:
        expected = json.loads(path.read_text())
        for name, one in sorted(expected.items()):
            size, digest = one["bytes"], one["sha256"]
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes instead of {size}"
            if _sha256(file) != digest:
                return f"{name} has other contents than were written"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{_FILE} cannot be read"
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _FILE)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
