"""Serialized programs: `export` writes a classifier as a program, and `load` loads the program.

`load` imports neither transformers nor the model's code.
"""

from typing import TYPE_CHECKING, Any

from pabee_jax.inference.artifact import Artifact, ExportedClassifier, load

if TYPE_CHECKING:
    from pabee_jax.inference.export import export

__all__ = ["Artifact", "ExportedClassifier", "export", "load"]


def __getattr__(name: str) -> Any:
    if name != "export":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pabee_jax.inference.export import export

    return export
