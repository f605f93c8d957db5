"""Trains and evaluates the demo with several seeds, and prints the tables of docs/results-demo.md.

    python -m benchmarks.demo --seeds 0,1,2

Needs a quiet machine, because `evaluate --time` measures.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks import command_line

PATIENCES = range(6)
_KIND_PATIENCE = 2


def measured(seed: int, folder: Path) -> dict[str, Any]:
    """Train and evaluate the demo; return the results of every patience, and the exits by kind."""
    run = folder / f"demo-{seed}"
    train = ["train", "--config", "demo", f"--config.seed={seed}", "--workdir", str(run)]
    patience = ",".join(map(str, PATIENCES))
    evaluate = ["evaluate", "--checkpoint", str(run), "--patience", patience, "--time"]
    for arguments in (train, evaluate):
        command = [sys.executable, "-m", "pabee_jax.commands.main", *arguments]
        subprocess.run(command, check=True)
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    layers = defaultdict(list)
    with (run / "predictions.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            layers[row["kind"]].append(int(row[f"exit_layer_patience_{_KIND_PATIENCE}"]))
    kinds = {kind: statistics.fmean(of_kind) for kind, of_kind in layers.items()}
    return {"seed": seed, "rows": results["rows"], "mean_exit_layer_by_kind": kinds}


def tables(records: list[dict[str, Any]]) -> str:
    """Return the tables of docs/results-demo.md in Markdown, a column per seed."""
    names = [f"seed {record['seed']}" for record in records]
    lines = [_row(["patience", *names]), _row(["---"] * (len(names) + 1))]
    for index, patience in enumerate(PATIENCES):
        cells = []
        for record in records:
            row = record["rows"][index]
            layers, time = row["layer_speedup"], row["measured_speedup"]
            cells.append(f"{100 * row['accuracy']:.2f}, {layers:.2f}x layers, {time:.2f}x time")
        name = "0 (full depth)" if patience == 0 else str(patience)
        lines.append(_row([name, *cells]))
    lines += ["", f"Mean exit layer at patience {_KIND_PATIENCE}, by kind of sentence:", ""]
    lines += [_row(["kind", *names]), _row(["---"] * (len(names) + 1))]
    by_kind = [record["mean_exit_layer_by_kind"] for record in records]
    for kind in sorted(by_kind[0], key=lambda kind: (by_kind[0][kind], kind)):
        lines.append(_row([kind, *(f"{layers[kind]:.2f}" for layers in by_kind)]))
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(options) -> None:
    with tempfile.TemporaryDirectory() as folder:
        records = [measured(seed, Path(folder)) for seed in options.seeds]
    print(tables(records))
    command_line.save(options.output, "demo", options, records, figure=False)


def make_parser() -> argparse.ArgumentParser:
    parser = command_line.base_parser(__doc__)
    parser.add_argument(
        "--seeds",
        type=command_line.whole_numbers,
        default=[0, 1, 2],
        help="seeds, comma-separated (default: 0,1,2)",
    )
    return parser


if __name__ == "__main__":
    command_line.run(main, make_parser())
