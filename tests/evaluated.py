"""Helpers of the tests of `evaluate`: a finished run of an untrained model, and its options."""

import dataclasses
import json

import numpy as np

from helpers import tiny_checkpoint
from pabee_jax import EarlyExitClassifier
from pabee_jax.commands.evaluate_options import EvaluateOptions
from pabee_jax.data.config import FilesConfig
from pabee_jax.training import run_directory
from pabee_jax.training.config import TrainConfig

WORDS = ["a", "film", "was", "good", "the", "not", "at", "all", "bad"]
ROWS = 41


def finished_run(folder, rows=ROWS, seed=3):
    """Write a finished run with five exits under `folder`, and return its directory.

    The labels of the data alternate between "no" and "yes".
    """
    shape = {"num_hidden_layers": 5, "initializer_range": 0.5}
    checkpoint = tiny_checkpoint(folder / "plain", WORDS, **shape)
    random = np.random.default_rng(0)
    lines = [
        {"text": " ".join(random.choice(WORDS, random.integers(1, 25))), "label": label}
        for label in (["no", "yes"] * rows)[:rows]
    ]
    for name in ("train", "dev"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    unlabeled_lines = [{"text": line["text"]} for line in lines]
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in unlabeled_lines))
    files = FilesConfig(train="train.jsonl", dev="dev.jsonl", test="test.jsonl")
    config = TrainConfig(task="files", model="-", data_dir=str(folder), files=files, seed=seed)
    config.max_seq_length = 32
    run_directory.prepare(folder / "run", config, {}, overwrite=False)
    classifier = EarlyExitClassifier.from_pretrained(str(checkpoint), num_labels=2, seed=seed)
    classifier.pretrained = dataclasses.replace(classifier.pretrained, label_names=("no", "yes"))
    classifier.save_pretrained(folder / "run")
    return folder / "run"


def options(run, **changes):
    """Return options of `evaluate` for the run, with patience 0 to 3 unless `changes` differ."""
    patience = {} if changes.get("calibrate") else {"patience": "0,1,2,3"}
    return EvaluateOptions(**{"checkpoint": str(run), **patience, **changes})
