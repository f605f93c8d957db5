"""The options of `convert`."""

import dataclasses

from pabee_jax.commands.options import option
from pabee_jax.commands.plugins import plugin_option
from pabee_jax.errors import InputError

FORMATS = ("plain", "flax", "pytorch-pabee", "onnx")


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """The options of `convert`; each field is a flag."""

    checkpoint: str = option("Required: run or checkpoint directory, or hub id.", "")
    output: str = option("Required: directory of the converted checkpoint; it must not exist.", "")
    to: str = option(
        "Required: plain, a sequence classifier for transformers; flax, the same for the Flax "
        "classes of transformers 4; pytorch-pabee, a checkpoint for PyTorch PABEE; or onnx, a "
        "model for ONNX Runtime with the early exit inside it.",
        "",
    )
    exit: int | None = option(
        "The exit, from 1, whose logits the plain or flax classifier has; by default the last."
    )
    sequence_length: int | None = option(
        "Tokens per row of the onnx model; by default as many as the checkpoint takes."
    )
    plugin: tuple[str, ...] = plugin_option()

    def __post_init__(self):
        for name, meaning in (
            ("checkpoint", "a checkpoint"),
            ("output", "the directory to write"),
            ("to", f"one of {', '.join(FORMATS)}"),
        ):
            if not getattr(self, name):
                raise InputError(f"--{name} is missing: it names {meaning}")
        if self.to not in FORMATS:
            raise InputError(f"--to is {self.to!r}; it must be one of {', '.join(FORMATS)}")
        for name, formats in (("exit", ("plain", "flax")), ("sequence_length", ("onnx",))):
            if getattr(self, name) is not None and self.to not in formats:
                raise InputError(f"--{name} has no effect without --to {' or '.join(formats)}")
