"""Draws the pictures of the documentation from the results in `docs/data`.

    python -m benchmarks.pictures

`python -m benchmarks.evidence --output docs/data/evidence --table` draws those of the results, and
`python docs/diagrams.py` the diagrams.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks import ablation, gradient_conflict, latency, serving, throughput

DATA = Path(__file__).parents[1] / "docs" / "data"


def _records(*names: str) -> list[dict[str, Any]]:
    """Return the records of the files `names` in `docs/data`."""
    contents = [json.loads((DATA / name).read_text(encoding="utf-8")) for name in names]
    return [record for content in contents for record in content["records"]]


def main(folder: Path = DATA.parent) -> None:
    """Draw the pictures of measured figures, except those of `benchmarks.evidence`, in `folder`."""
    latency.draw(_records("performance/latency.json"), folder / "latency.png")
    of_rows = _records("performance/throughput_few.json", "performance/throughput_256.json")
    throughput.draw([r for r in of_rows if r["rows"] in (8, 256)], folder / "throughput.png")
    ablation.draw(_records("performance/ablation.json"), folder / "ablation.png")
    gradient_conflict.draw(
        _records("gradient_conflict.json"), "stsb", folder / "gradient_conflict.png"
    )
    serving.draw(folder / "serving.png", _records("serving/serving.json"))


if __name__ == "__main__":
    main()
