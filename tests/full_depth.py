"""Prints the largest difference at full depth between a classifier and the same with exits.

    python full_depth.py CLASSIFIER CHECKPOINT

Prints a JSON object: by driver, the largest difference of the logits of 16 rows of 1 token to the
most that the model takes.
"""

import json
import sys

import numpy as np

from pabee_jax import EarlyExitClassifier, Patience


def main() -> None:
    differences = {}
    for driver in ("auto", "full", "loop", "pool"):
        before, after = (
            EarlyExitClassifier.from_pretrained(path, driver=driver, criterion=Patience(0))
            for path in sys.argv[1:]
        )
        length = before.config.max_length
        lengths = np.linspace(1, length, 16).round().astype(int)[:, None]
        mask = (np.arange(length) < lengths).astype(int)
        random = np.random.default_rng(0)
        ids = random.integers(2, before.config.vocab_size, mask.shape) * mask
        rows = {"input_ids": ids, "attention_mask": mask}
        logits = [classifier.predict(rows).logits for classifier in (before, after)]
        differences[driver] = float(np.abs(logits[0] - logits[1]).max())
    print(json.dumps(differences))


if __name__ == "__main__":
    main()
