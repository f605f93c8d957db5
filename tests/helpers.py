"""Helpers of several test files: small random models, batches, and the recorded references."""

import functools
import json
import os
import re
from pathlib import Path

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from pabee_jax.checkpoints.names import to_tensors
from pabee_jax.criteria import Patience, as_arrays
from pabee_jax.data.batching import MODEL_INPUTS
from pabee_jax.data.dataset import Dataset
from pabee_jax.distributed import sharding
from pabee_jax.drivers.ragged import RaggedBatch
from pabee_jax.drivers.shapes import ChunkSizes
from pabee_jax.inference.classifier import EarlyExitClassifier
from pabee_jax.inference.dispatch import padded_job, ragged_job
from pabee_jax.inference.programs import run_loop, run_pool
from pabee_jax.models.config import ModelConfig
from pabee_jax.models.encoder import EarlyExitModel
from pabee_jax.models.families import FAMILIES
from pabee_jax.models.parameters import split

REFERENCES = Path(__file__).parent / "references"
SHARED = Path(__file__).parents[2] / "shared"

TINY = {
    "vocab_size": 60,
    "hidden_size": 32,
    "embedding_size": 16,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    # With 0.3, the exits of a random model disagree. With the usual 0.02, all exits predict the
    # same class.
    "initializer_range": 0.3,
}


def tiny_model(family: str = "albert", labels: int = 3, seed: int = 0, **overrides):
    """Return a random model of 6 layers (by default) whose exits disagree often."""
    values = {"num_hidden_layers": 6, **TINY, **overrides}
    names = FAMILIES[family].names  # Those that differ in Hugging Face's configuration.
    values = {names.get(name, name): value for name, value in values.items()}
    values |= {"model_type": family}
    if family not in ("albert", "electra"):
        del values["embedding_size"]
    config = ModelConfig.from_hugging_face(values, labels)
    return EarlyExitModel(config, rngs=nnx.Rngs(seed))


def random_batch(rows: int, length: int = 12, seed: int = 0) -> dict[str, np.ndarray]:
    """Return a padded batch of random token ids, with random lengths and two token types."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, length + 1, rows)
    mask = (np.arange(length) < lengths[:, None]).astype(np.int32)
    ids = rng.integers(1, TINY["vocab_size"], (rows, length), dtype=np.int32) * mask
    token_types = (np.arange(length) >= lengths[:, None] // 2).astype(np.int32) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": token_types}


def tiny_checkpoint(directory: Path, words: list[str], **overrides) -> Path:
    """Save a random BERT checkpoint without classifiers and return its directory.

    The vocabulary is the five special tokens and these words.
    """
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    values = {
        "model_type": "bert",
        "vocab_size": len(vocabulary),
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
        **overrides,
    }
    model = EarlyExitModel(ModelConfig.from_hugging_face(values, 1), rngs=nnx.Rngs(0))
    tensors = {
        name: np.ascontiguousarray(value)
        for name, value in to_tensors(model).items()
        if not name.startswith("classifiers.")
    }
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(values))
    (directory / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


# The words of `tiny_classifier`.
FILM_WORDS = ["good", "bad", "film", "plot", "the", "a"]


def film_texts(count: int) -> list[str]:
    """Return texts of 1 to 9 of the words of `tiny_classifier`."""
    return [
        " ".join(FILM_WORDS[(3 * row + place) % 6] for place in range(1 + row % 9))
        for row in range(count)
    ]


def tiny_classifier(folder: Path, num_labels: int, **overrides) -> str:
    """Save a random classifier whose rows exit at several layers; return its directory.

    Its encoder is in `folder` / "encoder", and its criterion is patience 1.
    """
    fields = {"num_hidden_layers": 5, "initializer_range": 0.5} | overrides
    tiny_checkpoint(folder / "encoder", FILM_WORDS, **fields)
    classifier = EarlyExitClassifier.from_pretrained(
        folder / "encoder", num_labels=num_labels, criterion=Patience(1)
    )
    classifier.save_pretrained(folder / "classifier")
    return str(folder / "classifier")


def run_on(mesh, model, batch, criterion, chunk_rows=None, **driver):
    """Run a driver on a mesh, and return the exit layers and the logits of the batch's rows.

    Without `chunk_rows`, the driver is `loop`, and the batch is padded to a multiple of the number
    of devices. With `chunk_rows`, the driver is `pool`, in chunks of as many of the longest rows.
    """
    devices, rows = mesh.shape[sharding.DATA], len(batch["input_ids"])
    structure, parameters = split(model)
    parameters, row = sharding.replicate(parameters, mesh), np.arange(rows)
    tokens = Dataset(*(batch[name] for name in MODEL_INPUTS))
    if chunk_rows is None:
        run = functools.partial(run_loop, **driver)
        job = padded_job(row, tokens, rows, mesh, None)
    else:
        longest = int(tokens.lengths.max())
        most = rows // devices + 2, int(tokens.lengths.sum()), longest
        job = ragged_job(row, tokens, *most, mesh, None)
        driver["sizes"] = ChunkSizes.of(chunk_rows * longest, longest)
        run = functools.partial(run_pool, **driver)
    batch = sharding.shard_batch(job.batch | {"row": job.row_of_place}, mesh)
    row = batch.pop("row")
    batch = batch if chunk_rows is None else RaggedBatch(**batch)
    exits = run(structure, mesh, parameters, batch, as_arrays(criterion), row)
    exit_layers, logits = map(np.asarray, exits)
    assert (np.delete(exit_layers, job.places) == 0).all(), (
        "a padding row has an exit layer; a driver must not run padding rows"
    )
    return exit_layers[job.places], logits[job.places]


def one_device_environment() -> dict[str, str]:
    """Return the environment of a new process with one device and the tests' cheap compilation."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    return {**os.environ, "XLA_FLAGS": flags}
