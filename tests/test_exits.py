"""Exits that PyTorch PABEE cannot compute: one pooler per exit, and mean pooling."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from helpers import random_batch, run_on, tiny_checkpoint, tiny_model
from pabee_jax import EarlyExitClassifier, InputError, Patience, replay
from pabee_jax.checkpoints.pretrained import load_pretrained
from pabee_jax.checkpoints.saving import save_pretrained
from pabee_jax.criteria import MaxProbability
from pabee_jax.distributed import sharding
from pabee_jax.drivers.full import all_exit_logits
from pabee_jax.models.parameters import split, stacked

WORDS = ["good", "fine", "bad", "dull"]
PER_EXIT_MEAN = {"exit_pooler": "per_exit", "exit_pooling": "mean"}
KINDS = [
    {"exit_pooler": "per_exit", "exit_pooling": "cls"},
    {"exit_pooler": "shared", "exit_pooling": "mean"},
    PER_EXIT_MEAN,
]


def hidden_states(model, batch):
    hidden, mask, side = model.embed(batch)
    states = []
    for group in model.config.layer_groups:
        hidden = model.layer(model.groups[group], hidden, mask, side)
        states.append(np.asarray(hidden, np.float64))
    return states, np.asarray(mask)


@pytest.mark.parametrize("kind", KINDS)
def test_exit_logits_equal_numpy_with_a_masked_token_inside_the_text(kind):
    model = tiny_model("bert", num_hidden_layers=3, **kind)
    batch = random_batch(5)
    batch["attention_mask"][:, 1] = 0
    logits = all_exit_logits(stacked(model), batch)
    states, mask = hidden_states(model, batch)
    parameters = {name: np.asarray(value) for name, value in split(model)[1].items()}
    for exit, hidden in enumerate(states):
        per_exit = kind["exit_pooler"] == "per_exit"
        kernel, bias = (
            parameters[f"pooler.{leaf}"][exit] if per_exit else parameters[f"pooler.{leaf}"]
            for leaf in ("kernel", "bias")
        )
        for row in range(5):
            tokens = hidden[row, mask[row]]
            features = tokens.mean(axis=0) if kind["exit_pooling"] == "mean" else hidden[row, 0]
            pooled = np.tanh(features @ kernel + bias)
            expected = (
                pooled @ parameters["classifiers.kernel"][exit]
                + parameters["classifiers.bias"][exit]
            )
            np.testing.assert_allclose(logits[exit, row], expected, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "albert"])
def test_the_loop_and_the_pool_equal_replay(family):
    """The confidence threshold is in the widest gap of the probabilities, away from rounding."""
    model = tiny_model(family, num_hidden_layers=4, **PER_EXIT_MEAN)
    batch = random_batch(14, seed=3)
    batch["attention_mask"][:, 1] = 0
    logits = np.asarray(jax.jit(all_exit_logits)(model, batch))
    highest = np.sort(np.asarray(jax.nn.softmax(logits).max(axis=2)).ravel())[20:-8]
    widest_gap = int(np.argmax(np.diff(highest)))
    threshold = float(highest[widest_gap : widest_gap + 2].mean())
    mesh = sharding.make_mesh(1)
    for criterion in (Patience(0), Patience(1), MaxProbability(threshold)):
        expected_layers, expected_logits = replay(criterion, logits)
        for chunk_rows in (None, 5):
            exit_layers, exit_logits = run_on(mesh, model, batch, criterion, chunk_rows)
            case = f"{criterion}, chunk_rows {chunk_rows} (None: loop)"
            np.testing.assert_array_equal(exit_layers, expected_layers, case)
            np.testing.assert_allclose(exit_logits, expected_logits, atol=2e-5)
        if criterion != Patience(0):
            distinct = set(np.asarray(expected_layers).tolist())
            assert len(distinct) > 1, "all rows exit at one layer; use another seed"


@pytest.fixture
def plain(tmp_path):
    return tiny_checkpoint(tmp_path / "plain", WORDS, initializer_range=0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_exits_that_pabee_lacks_are_saved_under_other_names_and_restored(kind, plain, tmp_path):
    loaded = load_pretrained(str(plain), num_labels=3, exits=kind)
    save_pretrained(loaded, tmp_path / "saved")
    values = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert {name: values[name] for name in kind} == kind
    assert values["architectures"] == ["BertModel"]
    names = set(load_file(tmp_path / "saved" / "model.safetensors"))
    pabee_names = [name for name in names if name.startswith("classifiers.")]
    assert not pabee_names, "PyTorch PABEE would load these; save them as exit_classifiers"
    assert {"exit_classifiers.0.weight", "exit_classifiers.1.bias"} <= names
    per_exit = kind["exit_pooler"] == "per_exit"
    assert per_exit == ("exit_poolers.1.weight" in names)
    assert per_exit == ("bert.pooler.dense.weight" not in names)
    restored = EarlyExitClassifier.from_pretrained(str(tmp_path / "saved"))
    texts = ["good", "bad and dull"]
    expected = EarlyExitClassifier(loaded).all_exit_logits(texts)
    np.testing.assert_array_equal(restored.all_exit_logits(texts), expected)
    with pytest.raises(InputError, match=r"cannot run this model: its exits have exit_pooler="):
        restored.save_pretrained(tmp_path / "other", for_pytorch=True)
    assert not (tmp_path / "other").exists()


def test_pabee_exits_are_saved_as_a_pytorch_pabee_checkpoint(plain, tmp_path):
    exits = {"exit_pooler": "shared", "exit_pooling": "cls"}
    loaded = load_pretrained(str(plain), num_labels=3, exits=exits)
    save_pretrained(loaded, tmp_path / "saved", for_pytorch=True)
    values = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert values["architectures"] == ["BertForSequenceClassificationWithPabee"]
    assert not any(name.startswith("exit_") for name in values)
    names = set(load_file(tmp_path / "saved" / "model.safetensors"))
    assert "classifiers.1.weight" in names and not any("exit_" in name for name in names)


def test_the_pooler_of_every_exit_is_initialized_from_the_encoders_pooler(plain):
    tensor = load_file(plain / "model.safetensors")["bert.pooler.dense.weight"]
    model = load_pretrained(str(plain), num_labels=2, exits=KINDS[0]).model
    for kernel in model.pooler.kernel[...]:
        np.testing.assert_array_equal(kernel, tensor.T)


def test_without_a_pooler_in_the_checkpoint_poolers_are_initialized_from_the_seed(plain):
    tensors = load_file(plain / "model.safetensors")
    without_pooler = {name: value for name, value in tensors.items() if "pooler" not in name}
    save_file(without_pooler, plain / "model.safetensors", metadata={"format": "pt"})
    first, second = (
        load_pretrained(str(plain), num_labels=2, seed=seed, exits=KINDS[0]).model.pooler
        for seed in (1, 2)
    )
    assert (first.kernel[...] != second.kernel[...]).mean() > 0.99
    assert (first.kernel[0] != first.kernel[1]).any(), "each exit needs its own random pooler"


def test_only_missing_classifiers_are_initialized_with_the_given_bias(plain, tmp_path):
    bias = np.array([-1.0, 2.0], np.float32)
    loaded = load_pretrained(str(plain), num_labels=2, classifier_bias=bias)
    np.testing.assert_array_equal(loaded.model.classifiers.bias[...], [bias, bias])
    save_pretrained(loaded, tmp_path / "saved")
    restored = load_pretrained(str(tmp_path / "saved"), num_labels=2, classifier_bias=5 * bias)
    np.testing.assert_array_equal(restored.model.classifiers.bias[...], [bias, bias])


@pytest.fixture
def per_exit_mean(plain, tmp_path):
    """A saved checkpoint with one pooler per exit and mean pooling."""
    directory = tmp_path / "per_exit_mean"
    save_pretrained(load_pretrained(str(plain), num_labels=2, exits=PER_EXIT_MEAN), directory)
    return directory


def test_trained_exits_cannot_be_loaded_as_exits_of_another_kind(plain, per_exit_mean, tmp_path):
    with pytest.raises(InputError, match="trained exits with exit_pooler=per_exit and exit_pooli"):
        load_pretrained(str(per_exit_mean), num_labels=2, exits=KINDS[1])
    save_pretrained(load_pretrained(str(plain), num_labels=2), tmp_path / "pabee")
    with pytest.raises(
        InputError, match="cannot be loaded with exit_pooler=shared and exit_pooling"
    ):
        load_pretrained(str(tmp_path / "pabee"), num_labels=2, exits=KINDS[1])


def test_exits_that_config_json_does_not_describe_are_refused(per_exit_mean):
    path = per_exit_mean / "config.json"
    values = json.loads(path.read_text())
    other_values = {name: value for name, value in values.items() if name not in PER_EXIT_MEAN}
    path.write_text(json.dumps(other_values))
    with pytest.raises(
        InputError, match=r"parameters are classifiers\.\*, but the weights are exit_classifiers"
    ):
        load_pretrained(str(per_exit_mean))


def test_a_missing_pooler_of_one_exit_is_an_error(per_exit_mean):
    tensors = load_file(per_exit_mean / "model.safetensors")
    del tensors["exit_poolers.1.weight"]
    save_file(tensors, per_exit_mean / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="exit_poolers for some exits, but lacks exit_poolers.1.w"):
        load_pretrained(str(per_exit_mean))


@pytest.mark.parametrize("name", PER_EXIT_MEAN)
def test_an_unknown_value_of_an_exit_setting_is_refused(plain, name):
    values = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(values | {name: "median"}))
    with pytest.raises(InputError, match=f"{name} is 'median'; it must be one of"):
        load_pretrained(str(plain), num_labels=2)
