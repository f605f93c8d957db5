"""Digests of the files of a checkpoint, which detect files that changed after they were written."""

import hashlib
import json
import pathlib
from typing import Any

from etils import epath

from pabee_jax.io import storage
from pabee_jax.io.atomic import write_atomically

_FILE = "digests.json"


def write(folder: epath.Path) -> None:
    """Write the size and a digest of every file in `folder` to `digests.json` in `folder`."""
    text = json.dumps(_file_digests(folder), indent=1) + "\n"
    write_atomically(folder / _FILE, lambda path: path.write_text(text))


def problem(folder: epath.Path) -> str | None:
    """Describe the first file that differs from its digest; return None if no file differs.

    A folder with files, but without digests is taken to be intact: the run was killed before it
    wrote the digests, or an older version wrote the folder.

    Raises:
        OSError: a file cannot be read.
    """
    path, actual_files = folder / _FILE, _file_digests(folder)
    if not path.exists():
        return None if actual_files else "it has no files"
    try:
        expected_files = json.loads(path.read_text())
        for name, expected in sorted(expected_files.items()):
            size = expected["bytes"]
            if name not in actual_files:
                return f"{name} is missing"
            actual = actual_files[name]
            if actual["bytes"] != size:
                return f"{name} has {actual['bytes']} bytes instead of {size}"
            if actual != expected:
                return f"{name} changed after it was written"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{_FILE} cannot be read"
    return None


def _file_digests(folder: epath.Path) -> dict[str, dict[str, Any]]:
    """Return `bytes` and `sha256` of every file, by name.

    In a bucket, `crc32c` replaces `sha256`, because a bucket stores the CRC-32C of every object.
    """
    if storage.is_remote(folder):
        return {
            name: {"bytes": about["size"], "crc32c": about["crc32c"]}
            for name, about in sorted(storage.objects(folder).items())
            if name != _FILE
        }
    local_folder = pathlib.Path(folder)
    files = sorted(
        path for path in local_folder.rglob("*") if path.is_file() and path.name != _FILE
    )
    return {
        path.relative_to(local_folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": _sha256(path),
        }
        for path in files
    }


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
