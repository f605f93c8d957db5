"""Time from the start of a process to the first answer of a saved checkpoint, by parts.

    python -m benchmarks.first_answer --checkpoint DIR

"cold" compiles every program. "cached" is a later process with the same compilation cache.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile

from benchmarks import command_line

_PROCESS = """
import json, sys, time
start = time.perf_counter()
from pabee_jax import EarlyExitClassifier
marks = [time.perf_counter()]
checkpoint, cache, text = sys.argv[1:]
classifier = EarlyExitClassifier.from_pretrained(checkpoint, compilation_cache=cache or None)
marks.append(time.perf_counter())
classifier.predict([text])
marks.append(time.perf_counter())
classifier.predict([text])
marks.append(time.perf_counter())
print(json.dumps([end - begin for begin, end in zip([start, *marks], marks)]))
"""
_PARTS = ("import", "load", "first answer", "second answer")
_TEXT = "a text of ten words, as a service might get it"


def parts_of(checkpoint: str, cache: str) -> list[float]:
    """Return the seconds of every part of `_PARTS` in a new process."""
    command = [sys.executable, "-c", _PROCESS, checkpoint, cache, _TEXT]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(options) -> None:
    records = []
    with tempfile.TemporaryDirectory() as cache:
        parts_of(options.checkpoint, cache)  # Fills the cache.
        samples = {
            way: [parts_of(options.checkpoint, directory) for _ in range(options.rounds)]
            for way, directory in (("cold", ""), ("cached", cache))
        }
    for way, values in samples.items():
        medians = [statistics.median(part) for part in zip(*values, strict=True)]
        record = dict(zip((f"{part}, s" for part in _PARTS), medians, strict=True))
        records.append({"way": way, **record, "until the first answer, s": sum(medians[:3])})
    command_line.print_records(records, list(records[0]))
    command_line.save(options.output, "first_answer", options, records, figure=False)


def make_parser() -> argparse.ArgumentParser:
    parser = command_line.base_parser(__doc__)
    parser.add_argument("--checkpoint", required=True)
    command_line.add_rounds(parser, 3)
    return parser


if __name__ == "__main__":
    command_line.run(main, make_parser())
