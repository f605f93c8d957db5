"""The options of `convert`."""

import dataclasses

from pabee_jax.commands.options import option, refuse_without_effect
from pabee_jax.errors import InputError

FORMATS = ("plain", "pytorch-pabee")


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """The options of `convert`; each field is a flag."""

    checkpoint: str = option("Required: run or checkpoint directory, or hub id.", "")
    output: str = option("Required: directory of the converted checkpoint; it must not exist.", "")
    to: str = option(
        "Required: plain, a sequence classifier for transformers; or pytorch-pabee, a checkpoint "
        "for PyTorch PABEE.",
        "",
    )
    exit: int | None = option(
        "The exit, from 1, whose logits the plain classifier has; by default the last."
    )

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
        if self.to != "plain":
            refuse_without_effect(dataclasses.replace(self, to=""), {}, {"exit": ("to",)})
