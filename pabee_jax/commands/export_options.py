"""The options of `export`."""

import dataclasses

from pabee_jax.commands.options import option
from pabee_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """The options of `export`; each field is a flag."""

    checkpoint: str = option("Required: run or checkpoint directory, or hub id.", "")
    output: str = option("Required: directory of the exported program.", "")
    platforms: str | None = option(
        "Some of cpu, cuda, rocm, tpu, comma-separated; by default cpu,cuda,tpu."
    )
    sequence_length: int | None = option(
        "Tokens per row; by default as many as the checkpoint takes."
    )
    dtype: str = option("Compute type: float32 or bfloat16.", "float32")

    def __post_init__(self):
        for name, meaning in (("checkpoint", "a checkpoint"), ("output", "the directory to write")):
            if not getattr(self, name):
                raise InputError(f"--{name} is missing: it names {meaning}")
