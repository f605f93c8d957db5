"""Exits that PyTorch PABEE does not have: a pooler each, and the mean over the tokens."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from helpers import random_batch, tiny_checkpoint, tiny_model
from pabee_jax import EarlyExitClassifier, InputError, Patience, replay
from pabee_jax.checkpoints.pretrained import load_pretrained, save_pretrained
from pabee_jax.criteria import MaxProbability, as_arrays
from pabee_jax.distributed import sharding
from pabee_jax.drivers.full import all_exit_logits
from pabee_jax.inference.programs import run_early_exit
from pabee_jax.models.parameters import split, stacked

WORDS = ["good", "fine", "bad", "dull"]
OWN_MEAN = {"exit_pooler": "per_exit", "exit_pooling": "mean"}
KINDS = [
    {"exit_pooler": "per_exit", "exit_pooling": "cls"},
    {"exit_pooler": "shared", "exit_pooling": "mean"},
    OWN_MEAN,
]


def hidden_states(model, batch):
    hidden, mask = model.embed(batch)
    states = []
    for group in model.config.layer_groups:
        hidden = model.layer(model.groups[group], hidden, mask)
        states.append(np.asarray(hidden, np.float64))
    return states, np.asarray(mask)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_numpy(kind):
    """Row by row, with holes in the mask."""
    model = tiny_model("bert", num_hidden_layers=3, **kind)
    batch = random_batch(5)
    batch["attention_mask"][:, 1] = 0
    ours = all_exit_logits(stacked(model), batch)
    states, mask = hidden_states(model, batch)
    parameters = {name: np.asarray(value) for name, value in split(model)[1].items()}
    for exit, hidden in enumerate(states):
        own = kind["exit_pooler"] == "per_exit"
        kernel, bias = (
            parameters[f"pooler.{leaf}"][exit] if own else parameters[f"pooler.{leaf}"]
            for leaf in ("kernel", "bias")
        )
        for row in range(5):
            tokens = hidden[row, mask[row]]
            read = tokens.mean(axis=0) if kind["exit_pooling"] == "mean" else hidden[row, 0]
            pooled = np.tanh(read @ kernel + bias)
            expected = (
                pooled @ parameters["classifiers.kernel"][exit]
                + parameters["classifiers.bias"][exit]
            )
            np.testing.assert_allclose(ours[exit, row], expected, atol=2e-5)


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_every_driver_agrees(family):
    """Also a confidence threshold, which stands in the middle of a gap."""
    model = tiny_model(family, num_hidden_layers=4, **OWN_MEAN)
    batch = random_batch(14, seed=3)
    batch["attention_mask"][:, 1] = 0
    logits = np.asarray(jax.jit(all_exit_logits)(model, batch))
    highest = np.sort(np.asarray(jax.nn.softmax(logits).max(axis=2)).ravel())[20:-8]
    widest = int(np.argmax(np.diff(highest)))
    threshold = float(highest[widest : widest + 2].mean())
    mesh = sharding.make_mesh(1)
    graph, parameters = split(model)
    row = np.arange(14, dtype=np.int32)
    for criterion in (Patience(0), Patience(1), MaxProbability(threshold)):
        expected, answers = replay(criterion, logits)
        for chunk_size in (None, 5):
            found, ours = run_early_exit(
                graph, mesh, parameters, batch, as_arrays(criterion), row, chunk_size=chunk_size
            )
            np.testing.assert_array_equal(found, expected, f"{criterion}, chunks of {chunk_size}")
            np.testing.assert_allclose(ours, answers, atol=2e-5)
        if criterion != Patience(0):
            assert len(set(np.asarray(expected).tolist())) > 1, "this test needs several exits"


@pytest.fixture
def plain(tmp_path):
    return tiny_checkpoint(tmp_path / "plain", WORDS, initializer_range=0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_written_under_names_of_their_own_and_read_again(kind, plain, tmp_path):
    loaded = load_pretrained(str(plain), num_labels=3, exits=kind)
    save_pretrained(loaded, tmp_path / "saved")
    values = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert {name: values[name] for name in kind} == kind
    assert values["architectures"] == ["BertModel"]
    names = set(load_file(tmp_path / "saved" / "model.safetensors"))
    assert not any(name.startswith("classifiers.") for name in names), "PABEE would load these"
    assert {"exit_classifiers.0.weight", "exit_classifiers.1.bias"} <= names
    own = kind["exit_pooler"] == "per_exit"
    assert own == ("exit_poolers.1.weight" in names) == ("bert.pooler.dense.weight" not in names)
    again = EarlyExitClassifier.from_pretrained(str(tmp_path / "saved"))
    texts = ["good", "bad and dull"]
    expected = EarlyExitClassifier(loaded).all_exit_logits(texts)
    np.testing.assert_array_equal(again.all_exit_logits(texts), expected)
    with pytest.raises(InputError, match=r"cannot run this model: its exits have exit_pooler="):
        again.save_pretrained(tmp_path / "other", for_pytorch=True)
    assert not (tmp_path / "other").exists()


def test_what_pabee_can_express_is_written_as_pabee(plain, tmp_path):
    exits = {"exit_pooler": "shared", "exit_pooling": "cls"}
    loaded = load_pretrained(str(plain), num_labels=3, exits=exits)
    save_pretrained(loaded, tmp_path / "saved", for_pytorch=True)
    values = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert values["architectures"] == ["BertForSequenceClassificationWithPabee"]
    assert not any(name.startswith("exit_") for name in values)
    names = set(load_file(tmp_path / "saved" / "model.safetensors"))
    assert "classifiers.1.weight" in names and not any("exit_" in name for name in names)


def test_every_pooler_starts_from_the_encoders_own(plain):
    tensor = load_file(plain / "model.safetensors")["bert.pooler.dense.weight"]
    model = load_pretrained(str(plain), num_labels=2, exits=KINDS[0]).model
    for kernel in model.pooler.kernel[...]:
        np.testing.assert_array_equal(kernel, tensor.T)


def test_poolers_start_from_the_seed_where_there_is_none(plain):
    tensors = load_file(plain / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "pooler" not in name}
    save_file(kept, plain / "model.safetensors", metadata={"format": "pt"})
    one, other = (
        load_pretrained(str(plain), num_labels=2, seed=seed, exits=KINDS[0]).model.pooler
        for seed in (1, 2)
    )
    assert (one.kernel[...] != other.kernel[...]).mean() > 0.99
    assert (one.kernel[0] != one.kernel[1]).any(), "exits should not start alike"


def test_only_new_classifiers_start_at_the_prior(plain, tmp_path):
    bias = np.array([-1.0, 2.0], np.float32)
    loaded = load_pretrained(str(plain), num_labels=2, classifier_bias=bias)
    np.testing.assert_array_equal(loaded.model.classifiers.bias[...], [bias, bias])
    save_pretrained(loaded, tmp_path / "saved")
    again = load_pretrained(str(tmp_path / "saved"), num_labels=2, classifier_bias=5 * bias)
    np.testing.assert_array_equal(again.model.classifiers.bias[...], [bias, bias])


def test_trained_exits_cannot_become_others(plain, tmp_path):
    save_pretrained(load_pretrained(str(plain), num_labels=2, exits=OWN_MEAN), tmp_path / "own")
    with pytest.raises(InputError, match="trained exits with exit_pooler=per_exit and exit_pooli"):
        load_pretrained(str(tmp_path / "own"), num_labels=2, exits=KINDS[1])
    save_pretrained(load_pretrained(str(plain), num_labels=2), tmp_path / "pabee")
    with pytest.raises(InputError, match="they cannot go on with exit_pooler=shared and exit_poo"):
        load_pretrained(str(tmp_path / "pabee"), num_labels=2, exits=KINDS[1])


def test_exits_that_config_json_does_not_describe(plain, tmp_path):
    save_pretrained(load_pretrained(str(plain), num_labels=2, exits=OWN_MEAN), tmp_path / "own")
    path = tmp_path / "own" / "config.json"
    values = json.loads(path.read_text())
    kept = {name: value for name, value in values.items() if name not in OWN_MEAN}
    path.write_text(json.dumps(kept))
    with pytest.raises(
        InputError, match=r"called classifiers\.\*, but the weights hold exit_classifiers"
    ):
        load_pretrained(str(tmp_path / "own"))


def test_exits_with_a_hole(plain, tmp_path):
    save_pretrained(load_pretrained(str(plain), num_labels=2, exits=OWN_MEAN), tmp_path / "own")
    tensors = load_file(tmp_path / "own" / "model.safetensors")
    del tensors["exit_poolers.1.weight"]
    save_file(tensors, tmp_path / "own" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="exit_poolers for some exits, but lacks exit_poolers.1.w"):
        load_pretrained(str(tmp_path / "own"))


@pytest.mark.parametrize("name", OWN_MEAN)
def test_an_unknown_kind_of_exit(plain, name):
    values = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(values | {name: "median"}))
    with pytest.raises(InputError, match=f"{name} is 'median'; it must be one of"):
        load_pretrained(str(plain), num_labels=2)
