"""The folder of a command's results: written together, and never over the files of others."""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from pabee_jax.errors import InputError
from pabee_jax.io import storage


@dataclasses.dataclass(frozen=True)
class ResultsFolder:
    """The folder of a command's results.

    One of the files, the index, is a JSON object that lists the names of all files under "files".
    A file that the index does not list was not written by the command.

    Attributes:
        path: the folder; it need not exist.
        index: name of the index, such as "results.json".
        overwrite: whether files that the command did not write may be replaced.
    """

    path: epath.Path
    index: str
    overwrite: bool = False

    @functools.cached_property
    def earlier(self) -> Mapping[str, Any]:
        """The index of the earlier results; empty if there are none."""
        try:
            values = json.loads((self.path / self.index).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        # Version 0.1.0 wrote versions and hardware, but no list of files.
        is_index = isinstance(values, dict) and (_is_names(values.get("files")) or "jax" in values)
        return values if is_index else {}

    def check(self, names: Collection[str], about: Mapping[str, Any] | None = None) -> None:
        """Check that the files may be written. Changes no file.

        Args:
            names: the files that the command is going to write.
            about: values of the index that earlier results must share to be replaced.

        Raises:
            InputError: the folder holds a file of this name that the command did not write, or
                results that differ in `about`; neither is an error with `overwrite`.
        """
        if self.overwrite:
            return
        earlier_names = self.earlier.get("files", names if self.earlier else ())
        for name in names:
            if name not in earlier_names and (self.path / name).exists():
                raise InputError(
                    f"{self.path / name} exists and was not written by this command: choose "
                    "another --output, or replace the file with --overwrite"
                )
        for name, value in (about or {}).items():
            if self.earlier and self.earlier.get(name, value) != value:
                raise InputError(
                    f"{self.path} holds results of {name} {self.earlier[name]}, not {value}: "
                    "choose another --output, or replace them with --overwrite"
                )

    @contextlib.contextmanager
    def replace(self, stale: Collection[str] = ()) -> Iterator[Path]:
        """Yield an empty local folder whose files are in `path` after the `with` block.

        If the block raises an exception, or if a file cannot be written, `path` does not change.

        Args:
            stale: files of earlier results that are removed at the end of the block.

        Raises:
            InputError: a file cannot be written.
        """
        try:
            if storage.is_remote(self.path):
                with storage.local_folder(self.path) as folder:
                    yield folder
            else:
                storage.make_folder(self.path)
                with _staging_folder(Path(self.path)) as folder:
                    yield folder
                    self._move(folder)
            for name in stale:
                (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            failed_path, reason = error.filename or self.path, storage.reason_of(error)
            raise InputError(f"the results cannot be written: {failed_path}: {reason}") from None

    def _move(self, folder: Path) -> None:
        # The index comes last: it lists only files that exist.
        names = sorted(
            (path.name for path in folder.iterdir()), key=lambda name: name == self.index
        )
        for name in names:
            if (Path(self.path) / name).is_dir():
                raise IsADirectoryError(21, "Is a directory", str(self.path / name))
        for name in names:
            os.replace(folder / name, Path(self.path) / name)


@contextlib.contextmanager
def _staging_folder(parent: Path) -> Iterator[Path]:
    # Inside of the folder of the results: a rename is atomic within one file system only.
    folder = Path(tempfile.mkdtemp(prefix=".results-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_names(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)
