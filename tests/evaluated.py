"""A finished run of an untrained model, and the arguments with which tests evaluate it."""

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
    """A run directory under `folder` with five exits, and its data: two classes in turn."""
    shape = {"num_hidden_layers": 5, "initializer_range": 0.5}
    plain = tiny_checkpoint(folder / "plain", WORDS, **shape)
    random = np.random.default_rng(0)
    lines = [
        {"text": " ".join(random.choice(WORDS, random.integers(1, 25))), "label": label}
        for label in (["no", "yes"] * rows)[:rows]
    ]
    for name in ("train", "dev"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = [{"text": line["text"]} for line in lines]
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in texts))
    files = FilesConfig(train="train.jsonl", dev="dev.jsonl", test="test.jsonl")
    config = TrainConfig(task="files", model="-", data_dir=str(folder), files=files, seed=seed)
    config.max_seq_length = 32
    run_directory.prepare(folder / "run", config, overwrite=False)
    classifier = EarlyExitClassifier.from_pretrained(str(plain), num_labels=2, seed=seed)
    named = dataclasses.replace(classifier.pretrained, label_names=("no", "yes"))
    classifier.pretrained = named
    classifier.save_pretrained(folder / "run")
    return folder / "run"


def options(run, **changes):
    """The options of `evaluate`."""
    patience = {} if changes.get("calibrate") else {"patience": "0,1,2,3"}
    return EvaluateOptions(**{"checkpoint": str(run), **patience, **changes})
