"""`pabee-jax predict` on a large file: rows per second, memory over time, and SIGKILL.

    python -m benchmarks.predict_file

Random texts and a model of random weights, in four steps:

1. `EarlyExitClassifier.predict` on the first rows, in memory: the rows per second of the driver.
2. `pabee-jax predict` on the whole file, whose resident memory is sampled. Its rows per second are
   those between the end of its first block and the end of its last.
3. Again the first rows in memory, so that a slow moment of the machine affects both.
4. `pabee-jax predict`, killed with SIGKILL --kills times and continued: the same bytes.
"""

import argparse
import filecmp
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from transformers import BertTokenizerFast

from benchmarks import command_line
from benchmarks.models import SHAPES, random_model
from pabee_jax import EarlyExitClassifier, Patience
from pabee_jax.checkpoints.pretrained import Pretrained
from pabee_jax.inference.file_job import ROWS_PER_BLOCK

_MAX_LENGTH = 128
_PAGE = os.sysconf("SC_PAGE_SIZE")
_IN_MEMORY = """
import sys, time
from pabee_jax import EarlyExitClassifier
checkpoint, file, rows = sys.argv[1], sys.argv[2], int(sys.argv[3])
classifier = EarlyExitClassifier.from_pretrained(checkpoint)
with open(file, encoding="utf-8") as lines:
    next(lines)
    texts = [next(lines).rstrip("\\n").split("\\t")[1] for _ in range(rows)]
classifier.predict(texts[:2000])
start = time.perf_counter()
classifier.predict(texts)
print(rows / (time.perf_counter() - start))
"""


def make_checkpoint(folder: Path, shape: str) -> list[str]:
    """Save a model of random weights whose tokenizer knows invented words; return the words."""
    syllables = [first + second for first in "bdfgklmnprstv" for second in "aeiou"]
    words = [first + second for first in syllables for second in syllables][:4000]
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    tokenizer = BertTokenizerFast(str(vocabulary), model_max_length=_MAX_LENGTH)
    pretrained = Pretrained(random_model(shape), tokenizer, SHAPES[shape], ("0", "1"), _MAX_LENGTH)
    EarlyExitClassifier(pretrained, criterion=Patience(1)).save_pretrained(folder / "checkpoint")
    return words


def write_rows(path: Path, rows: int, words: list[str]) -> None:
    """Write a TSV file of texts of 4 to 60 words, 18 on average."""
    random = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        file.write("id\ttext\n")
        for row in range(rows):
            length = int(np.clip(random.lognormal(np.log(16), 0.5), 4, 60))
            text = " ".join(words[index] for index in random.integers(0, len(words), length))
            file.write(f"{row}\t{text}\n")


class Job:
    """A `pabee-jax predict` in a process of its own."""

    def __init__(self, folder: Path, output: Path):
        command = [sys.executable, "-m", "pabee_jax.commands.main", "predict", "--keep=id"]
        command += [f"--checkpoint={folder / 'checkpoint'}", f"--input={folder / 'rows.tsv'}"]
        self.output = output
        self.start = time.monotonic()
        self.process = subprocess.Popen([*command, f"--output={output}"])

    @property
    def blocks(self) -> int:
        """The finished blocks."""
        parts = self.output.with_name(f"{self.output.name}.parts")
        return len(list(parts.glob("[0-9]*.json"))) if parts.is_dir() else 0

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def resident_mb(self) -> float:
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * _PAGE / 1e6

    def finish(self) -> None:
        if self.process.wait() != 0:
            raise SystemExit(f"predict ended with status {self.process.returncode}")


def in_memory(folder: Path, rows: int) -> float:
    """Return the rows per second of `EarlyExitClassifier.predict`."""
    command = [sys.executable, "-c", _IN_MEMORY, folder / "checkpoint", folder / "rows.tsv"]
    done = subprocess.run([*map(str, command), str(rows)], stdout=subprocess.PIPE, check=True)
    return float(done.stdout.splitlines()[-1])


def undisturbed(folder: Path, rows: int) -> dict:
    """Run the whole job; return its speed and its memory over time."""
    job, samples, ends = Job(folder, folder / "undisturbed.tsv"), [], {}
    while job.is_running:
        time.sleep(0.25)
        blocks = job.blocks
        if blocks:
            ends.setdefault(blocks, time.monotonic())
        if ends and job.is_running:
            samples.append(job.resident_mb())
    job.finish()
    first, last = min(ends), max(ends)
    rows_between = min(rows, last * ROWS_PER_BLOCK) - first * ROWS_PER_BLOCK
    quarters = np.array_split(samples, 4)
    return {
        "rows/s": rows_between / (ends[last] - ends[first]),
        "resident MB by quarter": [round(float(np.max(quarter))) for quarter in quarters],
        "seconds": time.monotonic() - job.start,
    }


def killed(folder: Path, rows: int, kills: int) -> bool:
    """Run the job with `kills` kills; return whether its output has the same bytes."""
    output, blocks = folder / "killed.tsv", -(-rows // ROWS_PER_BLOCK)
    for kill in range(kills):
        job = Job(folder, output)
        while job.is_running and job.blocks < (kill + 1) * blocks // (kills + 1):
            time.sleep(0.05)
        if not job.is_running:
            raise SystemExit("the job ended before it was killed: use more --rows")
        job.process.kill()
        job.process.wait()
    Job(folder, output).finish()
    return filecmp.cmp(folder / "undisturbed.tsv", output, shallow=False)


def main(options) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.tsv", options.rows, make_checkpoint(folder, options.shape))
        first_rows = min(options.rows, options.rows_in_memory)
        before = in_memory(folder, first_rows)
        record = undisturbed(folder, options.rows)
        after = in_memory(folder, first_rows)
        driver = (before + after) / 2
        record |= {
            "in memory rows/s": [before, after],
            "share of in memory": record["rows/s"] / driver,
            "kills": options.kills,
            "same bytes": killed(folder, options.rows, options.kills),
        }
    print(json.dumps(record, indent=1))
    command_line.save(options.output, "predict_file", options, [record], figure=False)


def make_parser() -> argparse.ArgumentParser:
    parser = command_line.base_parser(__doc__)
    parser.add_argument("--rows", type=command_line.positive_integer, default=200_000)
    parser.add_argument("--rows_in_memory", type=command_line.positive_integer, default=20_000)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="mini")
    parser.add_argument("--kills", type=command_line.positive_integer, default=3)
    return parser


if __name__ == "__main__":
    command_line.run(main, make_parser())
