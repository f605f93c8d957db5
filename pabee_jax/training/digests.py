"""Whether the files of a folder are still those that were written there."""

import hashlib
import json
import pathlib
from typing import Any

from etils import epath

from pabee_jax.io import storage
from pabee_jax.io.atomic import write_atomically

_FILE = "digests.json"


def write(folder: epath.Path) -> None:
    """Leaves the size and a digest of every file in `folder` beside them."""
    text = json.dumps(_found(folder), indent=1) + "\n"
    write_atomically(folder / _FILE, lambda path: path.write_text(text))


def problem(folder: epath.Path) -> str | None:
    """The first file that is not as it was written, in words; None if all are.

    A folder without digests (a kill came between the two, or an older version wrote it) is taken to
    be good.
    """
    path = folder / _FILE
    if not path.exists():
        return None
    try:
        expected, found = json.loads(path.read_text()), _found(folder)
        for name, one in sorted(expected.items()):
            size = one["bytes"]
            if name not in found:
                return f"{name} is missing"
            if found[name]["bytes"] != size:
                return f"{name} has {found[name]['bytes']} bytes instead of {size}"
            if found[name] != one:
                return f"{name} has other contents than were written"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{_FILE} cannot be read"
    return None


def _found(folder: epath.Path) -> dict[str, dict[str, Any]]:
    """By name: `bytes` and `sha256`; in a bucket `crc32c`, which it keeps of every object."""
    if storage.is_remote(folder):
        return {
            name: {"bytes": about["size"], "crc32c": about["crc32c"]}
            for name, about in sorted(storage.objects(folder).items())
            if name != _FILE
        }
    here = pathlib.Path(folder)
    files = sorted(path for path in here.rglob("*") if path.is_file() and path.name != _FILE)
    return {
        path.relative_to(here).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in files
    }


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
