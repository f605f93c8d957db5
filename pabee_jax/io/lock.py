"""A lock on a folder, which the operating system releases when the process ends."""

import contextlib
from collections.abc import Iterator

from etils import epath

from pabee_jax.errors import InputError
from pabee_jax.io import storage

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_FILE = ".lock"


@contextlib.contextmanager
def locked(folder: epath.Path, place: str, activity: str) -> Iterator[None]:
    """Create `folder`, and keep other processes out of it.

    The operating system releases the lock when the process ends, also when it is killed. A bucket
    cannot be locked, and some network file systems do not lock between machines.

    Args:
        folder: the folder to lock.
        place: how a message names the folder, such as "--workdir runs/mrpc".
        activity: what another process that holds the lock does, such as "trains in".

    Raises:
        InputError: another process holds the lock, or `folder` cannot be written.
    """
    if storage.is_remote(folder) or fcntl is None:
        yield
        return
    try:
        storage.make_folder(folder)
        file = (folder / LOCK_FILE).open("w")
    except OSError as error:
        raise InputError(f"{place} cannot be written: {storage.reason_of(error)}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"another process {activity} {place}: wait for it, or choose another place"
            ) from None
        yield
