"""Draws the pictures of the documentation from the results in `docs/data`.

    python -m benchmarks.pictures

`python -m benchmarks.evidence --output docs/data/evidence --table` draws those of the results, and
`python docs/diagrams.py` the diagrams.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks import ablation, command_line, gradient_conflict, latency, serving, throughput

DATA = Path(__file__).parents[1] / "docs" / "data"


def _records(*names: str) -> list[dict[str, Any]]:
    """Return the records of the files `names` in `docs/data`."""
    contents = [json.loads((DATA / name).read_text(encoding="utf-8")) for name in names]
    return [record for content in contents for record in content["records"]]


def main(options) -> None:
    folder = options.output
    latency.draw(_records("performance/latency.json"), folder / "latency.png")
    of_rows = _records("performance/throughput_few.json", "performance/throughput_256.json")
    throughput.draw([r for r in of_rows if r["rows"] in (8, 256)], folder / "throughput.png")
    ablation.draw(_records("performance/ablation.json"), folder / "ablation.png")
    gradient_conflict.draw(
        _records("gradient_conflict.json"), "stsb", folder / "gradient_conflict.png"
    )
    serving.draw(folder / "serving.png", _records("serving/serving.json"))


def make_parser():
    parser = command_line.base_parser(__doc__)
    parser.set_defaults(output=DATA.parent)
    return parser


if __name__ == "__main__":
    command_line.run(main, make_parser())
