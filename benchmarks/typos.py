"""Writes dev rows with typing errors, for `pabee-jax evaluate --perturbed`.

    python -m benchmarks.typos --task sst2 --data_dir GLUE --output RESULTS
    pabee-jax evaluate --checkpoint runs/sst2 --perturbed RESULTS/typos-sst2.jsonl

The rule: every word of at least four letters is changed with the probability --rate (pairs: in both
texts). A change swaps two neighboring inner letters, drops one inner letter or doubles one inner
letter, with the same probability each. The first and the last letter stay, so that a reader still
recognizes the word. The same seed gives the same file.
"""

import argparse
import json
import re

import numpy as np

from benchmarks import command_line
from pabee_jax.data import glue
from pabee_jax.io.atomic import write_atomically

_WORD = re.compile(r"[^\W\d_]{4,}")
_TASKS = ("mrpc", "sst2", "cola")


def with_typos(text: str, rate: float, random: np.random.Generator) -> str:
    """Return the text with a typing error in some of its words."""

    def changed(match: re.Match) -> str:
        word = match[0]
        if random.random() >= rate:
            return word
        kind = random.choice(("swap", "drop", "double"))
        # The letter and, for a swap, its right neighbor are inner letters.
        position = int(random.integers(1, len(word) - (2 if kind == "swap" else 1)))
        letter = word[position]
        if kind == "swap":
            return word[:position] + word[position + 1] + letter + word[position + 2 :]
        if kind == "drop":
            return word[:position] + word[position + 1 :]
        return word[:position] + letter + word[position:]

    return _WORD.sub(changed, text)


def main(options) -> None:
    random = np.random.default_rng(options.seed)
    task = glue.task(options.task, str(options.data_dir))
    (examples,) = task.read("dev").values()
    lines = []
    pairs = examples.pairs or [None] * len(examples.texts)
    for text, pair, label in zip(examples.texts, pairs, examples.labels, strict=True):
        row = {"original": text, "perturbed": with_typos(text, options.rate, random)}
        if pair is not None:
            row |= {"original_pair": pair, "perturbed_pair": with_typos(pair, options.rate, random)}
        lines.append(json.dumps(row | {"label": task.label_names[label]}) + "\n")
    path = options.output / f"typos-{options.task}.jsonl"
    write_atomically(path, lambda temporary: temporary.write_text("".join(lines), "utf-8"))
    print(f"written: {path}, {len(lines)} rows")


def make_parser() -> argparse.ArgumentParser:
    parser = command_line.base_parser(__doc__)
    parser.add_argument("--task", choices=_TASKS, required=True)
    parser.add_argument("--data_dir", required=True, help="directory of GLUE's task directories")
    parser.add_argument(
        "--rate", type=float, default=0.3, help="share of changed words (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    command_line.run(main, make_parser())
