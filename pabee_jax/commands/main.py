"""`pabee-jax COMMAND ...`: train, evaluate, compare or export."""

import importlib
import sys
from collections.abc import Sequence

from pabee_jax import __version__

# Each command is a module of this folder with a function `main(argv)`.
COMMANDS = {
    "train": "fine-tune an encoder with a classifier on every layer, or resume a run",
    "evaluate": "print quality and speed of every exit setting; choose a setting",
    "compare": "compare evaluated runs",
    "export": "write a checkpoint as one compiled program",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the first argument names; exit with status 2 if there is none."""
    _, *arguments = sys.argv if argv is None else argv
    name, *rest = arguments or ("",)
    if name in COMMANDS:
        importlib.import_module(f"pabee_jax.commands.{name}").main([f"pabee-jax {name}", *rest])
    elif name in ("--help", "-h", "help"):
        print(_usage())
    elif name == "--version":
        print(f"pabee_jax {__version__}")
    else:
        problem = f"unknown command {name!r}" if name else "the command is missing"
        print(f"error: {problem}\n{_usage()}", file=sys.stderr)
        sys.exit(2)


def _usage() -> str:
    lines = [f"  {name:<10}{description}" for name, description in COMMANDS.items()]
    return "\n".join(["usage: pabee-jax COMMAND [--help] [--flag=value ...]", "", *lines])


if __name__ == "__main__":
    main()
