"""The persistent compilation cache: stores compiled programs on disk for later processes."""

import os

import jax
from jax.experimental.compilation_cache import compilation_cache

from pabee_jax.errors import InputError
from pabee_jax.io import storage


def enable(directory: str | os.PathLike) -> None:
    """Enable JAX's persistent compilation cache in `directory` for the rest of this process.

    Small programs are stored as well: a model has about a dozen programs.

    Args:
        directory: a local directory or a `gs://` address; created if absent.

    Raises:
        InputError: the directory cannot be created or written to.
    """
    path = storage.path_of(directory)
    if path.exists() and not path.is_dir():
        raise InputError(f"the compilation cache {directory} is a file; it must be a directory")
    try:
        storage.make_folder(path)
        if not storage.is_remote(path) and not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(None, "permission denied")
    except OSError as error:
        raise InputError(
            f"the compilation cache {directory} cannot be written: {error.strerror}"
        ) from None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # Without the reset, a process that has already compiled a program does not use the cache.
    compilation_cache.reset_cache()
