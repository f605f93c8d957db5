"""Every family of encoders, with the classification head of `transformers` as the last exit."""

import functools
import importlib.util
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from helpers import REFERENCES
from pabee_jax import EarlyExitClassifier
from pabee_jax.checkpoints.files import read_config_json, read_tensors
from pabee_jax.checkpoints.names import from_tensors, to_tensors
from pabee_jax.checkpoints.plain import save_plain
from pabee_jax.checkpoints.pretrained import load_pretrained
from pabee_jax.drivers.full import all_exit_logits
from pabee_jax.models.config import ModelConfig
from pabee_jax.models.encoder import EarlyExitModel
from pabee_jax.models.parameters import split, stacked
from pabee_jax.training import memory

TOLERANCE = 2e-5
CLASSIFIERS = REFERENCES / "classifiers"
FAMILIES = sorted(path.name for path in CLASSIFIERS.iterdir())

run_embed = jax.jit(EarlyExitModel.embed)
run_layer = jax.jit(EarlyExitModel.layer)
run_full = jax.jit(all_exit_logits)


def assert_equals_pytorch(model: EarlyExitModel, expected) -> None:
    """Compare embeddings, every layer, and the head at every layer."""
    for parameter in (model.classifiers.kernel, model.classifiers.bias):
        parameter.set_value(jnp.broadcast_to(parameter[...][-1:], parameter.shape))
    batch = {name: expected[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    hidden, mask, side = run_embed(model, batch)
    states = [hidden]
    for layer, group in enumerate(model.config.layer_groups):
        states.append(run_layer(model, model.groups[group], states[-1], mask, side.of_layer(layer)))
    for name, actual, reference in (
        ("embeddings", states[0], expected["embeddings"]),
        *(
            (f"hidden states of layer {layer}", *pair)
            for layer, pair in enumerate(zip(states[1:], expected["hidden_states"], strict=True))
        ),
    ):
        difference = np.abs(np.asarray(actual) - reference)[np.asarray(mask)].max()
        assert difference < TOLERANCE, f"{name} differ from PyTorch by {difference:.1e}"
    for name, layout in (("separate groups", model), ("stacked groups", stacked(model))):
        difference = np.abs(run_full(layout, batch) - expected["logits"]).max()
        assert difference < TOLERANCE, f"logits with {name} differ by {difference:.1e}"


@functools.cache
def load(family: str):
    directory = CLASSIFIERS / family
    config = ModelConfig.from_hugging_face(read_config_json(directory), 3)
    return from_tensors(read_tensors(directory), config)


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_every_layer_and_the_head_equal_pytorch(family):
    model, report = load(family)
    assert report.unexpected == ()
    assert {name.partition(".")[0] for name in report.missing} <= {
        "classifiers",
        "exit_classifiers",
    }
    assert not [name for name in report.missing if ".3." in name], "the head is the last exit"
    assert_equals_pytorch(model, np.load(CLASSIFIERS / family / "expected.npz"))


@pytest.mark.slow
@pytest.mark.parametrize("layers", [3, 12])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_pytorch_at_both_depths(family, layers):
    pytest.importorskip("torch")
    sys.path.insert(0, str(REFERENCES))
    try:
        import pytorch_classifiers as reference
    finally:
        sys.path.remove(str(REFERENCES))
    classifier, batch = reference.make_classifier(family, layers), reference.make_batch(family)
    tensors = {name: value.numpy() for name, value in classifier.state_dict().items()}
    config = ModelConfig.from_hugging_face(classifier.config.to_dict(), 3)
    model, _ = from_tensors(tensors, config)
    assert_equals_pytorch(model, batch | reference.outputs(classifier, batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_loads_as_it_was(family):
    model, _ = load(family)
    saved = to_tensors(model)
    loaded, report = from_tensors(saved, model.config)
    assert report.missing == report.unexpected == ()
    parameters = split(loaded)[1]
    for name, value in split(model)[1].items():
        np.testing.assert_array_equal(parameters[name], value, err_msg=name)
    encoder = read_tensors(CLASSIFIERS / family)
    kept = [name for name in saved if name in encoder]
    assert len(kept) >= len(encoder) - 5, "the encoder's tensors keep their names"
    for name in kept:
        np.testing.assert_array_equal(saved[name], encoder[name], err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_number_of_parameters_is_known_without_building_the_model(family):
    model, _ = load(family)
    assert memory.parameter_count(model.config) == sum(
        value.size for value in split(model)[1].values()
    )


def checkpoint_of(family: str, directory: Path) -> Path:
    """Return a copy of the recorded classifier with a tokenizer."""
    shutil.copytree(CLASSIFIERS / family, directory)
    vocabulary = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "dull"]
    words = directory / "words.txt"
    words.write_text("\n".join(vocabulary) + "\n")
    transformers.BertTokenizerFast(str(words)).save_pretrained(directory)
    words.unlink()
    return directory


TEXTS = ["good", "a bad film", ("good film", "dull"), "dull dull film good bad good"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("exit_pooler", ["per_exit", "shared"])
def test_a_plain_classifier_has_the_logits_of_its_exit(family, exit_pooler, tmp_path):
    directory = checkpoint_of(family, tmp_path / "model")
    exits = {"exit_pooler": exit_pooler, "exit_pooling": "cls"}
    pretrained = load_pretrained(str(directory), exits=exits)
    expected = EarlyExitClassifier(pretrained).all_exit_logits(TEXTS)
    for exit in (1, 3, 4):
        target = tmp_path / f"plain-{exit}"
        save_plain(pretrained, target, exit)
        plain = EarlyExitClassifier.from_pretrained(str(target))
        assert plain.num_layers == exit and plain.pretrained.trained_exits == "last"
        np.testing.assert_allclose(plain.all_exit_logits(TEXTS)[-1], expected[exit - 1], atol=1e-6)
        if importlib.util.find_spec("torch"):
            tokens = plain.tokenize(TEXTS)
            logits = pytorch_logits(target, tokens)
            np.testing.assert_allclose(logits, expected[exit - 1], atol=2e-5)


def pytorch_logits(directory: Path, tokens) -> np.ndarray:
    import torch

    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory).eval()
    names = ["input_ids", "attention_mask"]
    if getattr(model.config, "type_vocab_size", 0) > 1:
        names.append("token_type_ids")
    with torch.no_grad():
        return model(**{name: torch.tensor(tokens[name]).long() for name in names}).logits.numpy()
