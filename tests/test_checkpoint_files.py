"""A checkpoint that cannot be used says why, in one sentence."""

import json
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from helpers import tiny_checkpoint
from pabee_jax import EarlyExitClassifier, InputError
from pabee_jax.checkpoints.files import resolve

WORDS = ["film", "good"]


@pytest.fixture
def checkpoint(tmp_path):
    return tiny_checkpoint(tmp_path / "plain", WORDS)


def refused(directory, message, num_labels=2):
    with pytest.raises(InputError, match=message) as error:
        EarlyExitClassifier.from_pretrained(str(directory), num_labels=num_labels)
    assert "\n" not in str(error.value)


def change_config(directory, **values):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_another_architecture(checkpoint):
    change_config(checkpoint, model_type="roberta")
    refused(checkpoint, "model type is 'roberta'; only bert and albert")


def test_relative_positions(checkpoint):
    change_config(checkpoint, position_embedding_type="relative_key")
    refused(checkpoint, "only absolute position embeddings")


def test_unknown_activation(checkpoint):
    change_config(checkpoint, hidden_act="step")
    refused(checkpoint, "hidden_act 'step' is not one of gelu")


@pytest.mark.parametrize("value", [None, "wide", 0])
def test_a_size_that_is_none(checkpoint, value):
    change_config(checkpoint, num_attention_heads=value)
    refused(checkpoint, "config.json holds an unusable value|must be at least 1")


def test_heads_that_do_not_divide(checkpoint):
    change_config(checkpoint, num_attention_heads=3)
    refused(checkpoint, "not a multiple of num_attention_heads 3")


def test_a_wrong_shape_is_named_in_the_files_own_layout(checkpoint):
    change_config(checkpoint, intermediate_size=48)
    refused(checkpoint, r"intermediate.dense.bias has shape \(32,\), .* asks for \(48,\)")


def test_classifiers_of_another_task(checkpoint, tmp_path):
    saved = tmp_path / "saved"
    EarlyExitClassifier.from_pretrained(str(checkpoint), num_labels=3).save_pretrained(saved)
    refused(saved, "classifiers.0.bias has 3 outputs, but 2 are asked for")


def test_an_encoder_with_a_hole(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    save_file(tensors, checkpoint / "model.safetensors")
    refused(checkpoint, r"lacks 1 of the encoder's parameters \(encoder.layer.1.output.dense.weig")


@pytest.mark.parametrize("keep", [0, 5, 2000])
def test_a_truncated_file(checkpoint, keep):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(checkpoint, "model.safetensors is damaged or not a weight file")


def test_a_truncated_flax_file(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "flax_model.msgpack").write_bytes(b"\x82\xa4bert")
    refused(checkpoint, "flax_model.msgpack is damaged or not a weight file")


def test_an_index_without_its_shards(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    refused(checkpoint, "names model-1.safetensors, which is not there")
    index.write_text("{}")
    refused(checkpoint, "is not an index of weight files")


def test_not_a_checkpoint(checkpoint, tmp_path):
    (checkpoint / "model.safetensors").unlink()
    refused(checkpoint, "it has none of model.safetensors, flax_model.msgpack, pytorch_model.bin")
    (checkpoint / "config.json").write_text("{")
    refused(checkpoint, "config.json is not JSON")
    (checkpoint / "config.json").write_text("[]")
    refused(checkpoint, "does not hold a JSON object")
    (checkpoint / "config.json").unlink()
    refused(checkpoint, "is not a checkpoint: it has no config.json")
    refused(tmp_path / "absent", "there is no directory")
    file = tmp_path / "file"
    file.write_text("")
    refused(file, "is a file; a checkpoint is a directory")


def test_no_tokenizer(checkpoint):
    (checkpoint / "vocab.txt").unlink()
    refused(checkpoint, "holds no tokenizer")


def test_a_tokenizer_of_another_model(checkpoint):
    (checkpoint / "vocab.txt").write_text("\n".join(f"word{i}" for i in range(9)) + "\nfilm\n")
    classifier = EarlyExitClassifier.from_pretrained(str(checkpoint), num_labels=2)
    with pytest.raises(InputError, match="the model knows only 7 tokens: they do not belong"):
        classifier.predict(["film"])


def test_pytorch_missing_names_the_extra(checkpoint, monkeypatch):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    refused(checkpoint, r"needs PyTorch: install pabee_jax\[torch\]")


def test_a_hub_id_without_a_network_is_answered_within_seconds(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    started = time.monotonic()
    with pytest.raises(InputError, match="give the path of a local directory"):
        resolve("nobody/has-this-model")
    assert time.monotonic() - started < 10


def test_what_is_missing_or_unused_is_said_by_name(checkpoint, caplog):
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["cls.predictions.bias"] = np.zeros(3, np.float32)
    del tensors["bert.pooler.dense.bias"]
    save_file(tensors, checkpoint / "model.safetensors")
    EarlyExitClassifier.from_pretrained(str(checkpoint), num_labels=2)
    assert "pooler.dense.bias" in caplog.text and "started from scratch" in caplog.text
    assert "also holds cls.predictions.bias: not used" in caplog.text
