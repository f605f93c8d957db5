"""`pabee-jax COMMAND ...`: train, evaluate, predict, serve, compare, convert or export."""

import pkgutil
import sys
from collections.abc import Sequence
from typing import NamedTuple

from pabee_jax import __version__
from pabee_jax.commands import interrupt


class Command(NamedTuple):
    """A command, whose module in this folder has a function `main(argv)`.

    Attributes:
        summary: what the command does.
        usage: an example.
        options: the options dataclass. Its module is quickly imported, and `--help` imports no
            other.
    """

    summary: str
    usage: str
    options: str


COMMANDS = {
    "train": Command(
        "fine-tune an encoder with a classifier on every layer, or resume a run",
        "--config demo --workdir runs/demo",
        "train_options:TrainOptions",
    ),
    "evaluate": Command(
        "print quality and speed of every exit setting; choose a setting",
        "--checkpoint runs/mrpc --patience 0,3,4,5,6",
        "evaluate_options:EvaluateOptions",
    ),
    "predict": Command(
        "write the predictions and exit layers of the rows of files",
        "--checkpoint runs/mrpc --input rows.csv --output predictions.csv",
        "predict_options:PredictOptions",
    ),
    "serve": Command(
        "answer requests over HTTP, each text when it exits",
        "--checkpoint runs/mrpc --port 8000",
        "serve_options:ServeOptions",
    ),
    "compare": Command(
        "compare evaluated runs; runs that differ only in their seed are pooled",
        "runs/a-seed0 runs/a-seed1 runs/b-seed0 runs/b-seed1",
        "compare_options:CompareOptions",
    ),
    "convert": Command(
        "write a checkpoint in a format that other libraries read",
        "--checkpoint runs/mrpc --output plain/mrpc --to plain --exit 4",
        "convert_options:ConvertOptions",
    ),
    "export": Command(
        "write a checkpoint as one compiled program",
        "--checkpoint runs/mrpc --output exported/mrpc --platforms cpu,cuda,tpu",
        "export_options:ExportOptions",
    ),
}
_HELP = frozenset({"--help", "-help", "-h", "--helpfull", "--helpshort"})


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the first argument names; exit with status 2 if there is none."""
    _, *arguments = sys.argv if argv is None else argv
    name, *rest = arguments or ("",)
    if name in COMMANDS:
        if _HELP.intersection(rest):
            print(_help(name))
        else:
            _run(name, [f"pabee-jax {name}", *rest])
    elif name in (*_HELP, "help"):
        print(_usage())
    elif name == "--version":
        print(f"pabee_jax {__version__}")
    else:
        problem = f"unknown command {name!r}" if name else "the command is missing"
        print(f"error: {problem}\n{_usage()}", file=sys.stderr)
        sys.exit(2)


def _run(name: str, argv: Sequence[str]) -> None:
    interrupt.deliver_dropped()
    try:
        interrupt.import_module(f"pabee_jax.commands.{name}").main(argv)
    except KeyboardInterrupt:
        interrupt.end()


def _help(name: str) -> str:
    from pabee_jax.commands.help import help_text

    command = COMMANDS[name]
    options = pkgutil.resolve_name(f"pabee_jax.commands.{command.options}")
    heading = f"pabee-jax {name}: {command.summary}\n\n  pabee-jax {name} {command.usage}"
    return f"{heading}\n\n{help_text(options)}"


def _usage() -> str:
    lines = [f"  {name:<10}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: pabee-jax COMMAND [--help] [--flag=value ...]", "", *lines])


if __name__ == "__main__":
    main()
