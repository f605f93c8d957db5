"""What all benchmarks share on the command line, and how they leave their results."""

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


def parser(description: str, *, models: str, budget_minutes: float) -> argparse.ArgumentParser:
    """The arguments that every benchmark takes."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--models", type=names_of(SHAPES), default=models.split(","))
    result.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    result.add_argument("--budget_minutes", type=_positive(float), default=budget_minutes)
    result.add_argument("--output", type=Path, default=Path("benchmark_results"))
    result.add_argument("--compilation_cache", help="a directory that keeps compiled programs")
    result.add_argument(
        "--torch", action=argparse.BooleanOptionalAction, default=pytorch.is_installed()
    )
    return result


def positive_integer(text: str) -> int:
    """An argument type."""
    return _positive(int)(text)


def positive_integers(text: str) -> list[int]:
    """An argument type: a comma-separated list."""
    return [positive_integer(part) for part in text.split(",")]


def whole_numbers(text: str) -> list[int]:
    """An argument type: a comma-separated list of whole numbers, 0 or more."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = [-1]
    if min(values) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers, 0 or more")
    return values


def names_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """An argument type: a comma-separated list of known names."""

    def convert(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return names

    return convert


def run(main: Callable[[argparse.Namespace], None], arguments: argparse.ArgumentParser) -> None:
    """Calls `main`; a mistake that a person can mend is one sentence and exit status 2."""
    values = arguments.parse_args()
    try:
        if getattr(values, "torch", False) and not pytorch.is_installed():
            raise InputError("--torch: PyTorch is not installed: pip install 'pabee_jax[torch]'")
        try:
            values.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--output {values.output}: {error.strerror}") from None
        if directory := getattr(values, "compilation_cache", None):
            compilation_cache.enable(directory)
        main(values)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def save(
    output: Path,
    name: str,
    values: argparse.Namespace,
    records: list[dict[str, Any]],
    *,
    picture: bool = True,
):
    """Writes `name`.json: arguments, environment and the table at full precision."""
    arguments = {key: str(value) for key, value in vars(values).items()}
    content = {"environment": environment(), "arguments": arguments, "records": records}
    path = output / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten: {path}{f', {output / name}.png' if picture else ''}")


def show(records: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Prints these columns of the records as a table."""
    print(table(columns, [[record[name] for name in columns] for record in records]))


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; floats with three decimals, or with four figures from 100 on."""
    lines = [[_text(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    rule = ["-" * (width - 1) + ":" for width in widths]
    return "\n".join(
        f"| {' | '.join(map(str.rjust, line, widths))} |" for line in (list(header), rule, *lines)
    )


def _text(cell: Any) -> str:
    if cell is None:
        return ""
    if isinstance(cell, float):
        return f"{cell:.4g}" if cell >= 100 else f"{cell:.3f}"
    return str(cell)


def _positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if value <= 0:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
        return value

    return convert
