"""Compiled programs kept on disk for the next process: JAX's persistent cache in one call."""

import os

import jax
from jax.experimental.compilation_cache import compilation_cache

from pabee_jax.errors import InputError
from pabee_jax.io import storage


def enable(directory: str | os.PathLike) -> None:
    """From now on this process looks compiled programs up in `directory`, and keeps them there.

    Every program is kept, however small: a model has a dozen. It may be a `gs://` address.

    Raises:
        InputError: the directory cannot be made or written to.
    """
    path = storage.path_of(directory)
    if path.exists() and not path.is_dir():
        raise InputError(f"the compilation cache {directory} is a file; it must be a directory")
    try:
        storage.make_folder(path)
        if not storage.is_remote(path) and not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(None, "it is not writable")
    except OSError as error:
        raise InputError(f"the compilation cache {directory}: {error.strerror}") from None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # Otherwise a process that already compiled has no cache.
