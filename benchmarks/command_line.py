"""Command-line arguments, tables and result files that the benchmarks share."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import pytorch
from benchmarks.measure import environment
from benchmarks.models import SHAPES
from pabee_jax.errors import InputError
from pabee_jax.inference import compilation_cache


def base_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the one argument that every benchmark takes, `--output`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("benchmark_results"),
        help="directory of the results (default: %(default)s)",
    )
    return parser


def add_shapes(parser: argparse.ArgumentParser, default: str) -> None:
    """Add `--model` for benchmarks that run models of known shapes with random weights."""
    parser.add_argument(
        "--model",
        type=names_of(SHAPES),
        default=default.split(","),
        help=f"shapes of models, comma-separated: {', '.join(SHAPES)} (default: {default})",
    )


def add_pretrained_model(parser: argparse.ArgumentParser) -> None:
    """Add `--model` and `--data_dir` for benchmarks that train a pretrained encoder on GLUE."""
    parser.add_argument("--model", default="", help="pretrained encoder: a directory or hub id")
    parser.add_argument("--data_dir", type=Path, help="directory of GLUE's task directories")


def add_dtype(parser: argparse.ArgumentParser, default: str = "float32") -> None:
    """Add `--dtype`."""
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default=default,
        help="compute type (default: %(default)s)",
    )


def add_budget(parser: argparse.ArgumentParser, minutes: float) -> None:
    """Add `--budget_minutes`, with `minutes` as its default."""
    parser.add_argument(
        "--budget_minutes",
        type=_positive(float),
        default=minutes,
        help="wall-clock time after which no round starts (default: %(default)s)",
    )


def add_rounds(parser: argparse.ArgumentParser, default: int) -> None:
    """Add `--rounds`."""
    parser.add_argument(
        "--rounds",
        type=positive_integer,
        default=default,
        help="most timed calls per measurement (default: %(default)s)",
    )


def add_compilation_cache(parser: argparse.ArgumentParser) -> None:
    """Add `--compilation_cache`, which `run` enables."""
    parser.add_argument("--compilation_cache", help="directory that keeps compiled programs")


def add_timing(parser: argparse.ArgumentParser, *, budget_minutes: float, rounds: int) -> None:
    """Add the arguments of benchmarks that time JAX and PyTorch in turns."""
    add_dtype(parser)
    add_budget(parser, budget_minutes)
    add_rounds(parser, rounds)
    add_compilation_cache(parser)
    add_torch(parser)


def add_torch(parser: argparse.ArgumentParser) -> None:
    """Add `--torch`, which is on if PyTorch is installed."""
    parser.add_argument(
        "--torch",
        action=argparse.BooleanOptionalAction,
        default=pytorch.is_installed(),
        help="also time PyTorch (default: if PyTorch is installed)",
    )


def refuse_without_effect(
    options: argparse.Namespace, parser: argparse.ArgumentParser, names: Iterable[str], reason: str
) -> None:
    """Raise InputError for the first option of `names` that differs from its default.

    Args:
        options: the parsed arguments.
        parser: the parser that parsed them.
        names: options that cannot change what this call of the benchmark does.
        reason: why they cannot, such as "with --checkpoint".
    """
    for name in names:
        if getattr(options, name) != parser.get_default(name):
            raise InputError(f"--{name} has no effect {reason}: leave it out")


def positive_integer(text: str) -> int:
    """Convert an argument to an integer of at least 1."""
    return _positive(int)(text)


def positive_integers(text: str) -> list[int]:
    """Convert a comma-separated argument to integers of at least 1."""
    return [positive_integer(part) for part in text.split(",")]


def whole_numbers(text: str) -> list[int]:
    """Convert a comma-separated argument to integers of at least 0."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [-1]
    if min(numbers) < 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a comma-separated list of integers of at least 0"
        )
    return numbers


def names_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Return an argument type: a comma-separated list of names that are in `known`."""

    def convert(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return names

    return convert


def run(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """Parse the arguments and call `main`.

    An InputError is printed as one sentence, and the process exits with status 2.
    """
    options = parser.parse_args()
    try:
        if getattr(options, "torch", False) and not pytorch.is_installed():
            raise InputError("--torch: PyTorch is not installed: pip install 'pabee_jax[torch]'")
        try:
            options.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--output {options.output}: {error.strerror}") from None
        if directory := getattr(options, "compilation_cache", None):
            compilation_cache.enable(directory)
        main(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def save(
    output: Path,
    name: str,
    options: argparse.Namespace,
    records: list[dict[str, Any]],
    *,
    figure: bool = True,
) -> None:
    """Write OUTPUT/NAME.json with the arguments, the environment and the unrounded records.

    Args:
        figure: whether the benchmark has also written OUTPUT/NAME.png, so that its path is printed.
    """
    arguments = {name: str(value) for name, value in vars(options).items()}
    content = {"environment": environment(), "arguments": arguments, "records": records}
    path = output / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten: {path}{f', {output / name}.png' if figure else ''}")


def print_records(records: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Print the columns `columns` of the records as a table."""
    print(table(columns, [[record[name] for name in columns] for record in records]))


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table.

    A float has three decimals; a float of at least 100 has four significant digits.
    """
    lines = [[_cell_text(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    rule = ["-" * (width - 1) + ":" for width in widths]
    return "\n".join(
        f"| {' | '.join(map(str.rjust, line, widths))} |" for line in (list(header), rule, *lines)
    )


def _cell_text(cell: Any) -> str:
    if cell is None:
        return ""
    if isinstance(cell, float):
        return f"{cell:.4g}" if cell >= 100 else f"{cell:.3f}"
    return str(cell)


def _positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def convert(text: str):
        try:
            number = kind(text)
        except ValueError:
            number = 0
        if number <= 0:
            raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
        return number

    return convert
