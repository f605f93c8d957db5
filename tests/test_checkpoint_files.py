"""Error messages for checkpoints that cannot be loaded."""

import json
import time
from types import SimpleNamespace

import huggingface_hub
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


def assert_refused(directory, message, num_labels=2):
    with pytest.raises(InputError, match=message) as error:
        EarlyExitClassifier.from_pretrained(str(directory), num_labels=num_labels)
    assert "\n" not in str(error.value), "an InputError's message must be one line"


def change_config(directory, **values):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_an_architecture_other_than_bert_and_albert_is_refused(checkpoint):
    change_config(checkpoint, model_type="roberta")
    assert_refused(checkpoint, "model type is 'roberta'; only bert and albert")


def test_relative_position_embeddings_are_refused(checkpoint):
    change_config(checkpoint, position_embedding_type="relative_key")
    assert_refused(checkpoint, "only absolute position embeddings")


def test_an_unknown_activation_is_refused(checkpoint):
    change_config(checkpoint, hidden_act="step")
    assert_refused(checkpoint, "hidden_act 'step' is not one of gelu")


@pytest.mark.parametrize("value", [None, "wide", 0])
def test_an_invalid_size_in_config_json_is_refused(checkpoint, value):
    change_config(checkpoint, num_attention_heads=value)
    assert_refused(checkpoint, "config.json holds an unusable value|must be at least 1")


def test_a_hidden_size_that_is_not_a_multiple_of_the_heads_is_refused(checkpoint):
    change_config(checkpoint, num_attention_heads=3)
    assert_refused(checkpoint, "not a multiple of num_attention_heads 3")


def test_a_wrong_shape_is_reported_in_the_layout_of_the_file(checkpoint):
    change_config(checkpoint, intermediate_size=48)
    assert_refused(checkpoint, r"intermediate.dense.bias has shape \(32,\), .* requires \(48,\)")


def test_trained_classifiers_with_another_number_of_labels_are_refused(checkpoint, tmp_path):
    saved = tmp_path / "saved"
    EarlyExitClassifier.from_pretrained(str(checkpoint), num_labels=3).save_pretrained(saved)
    assert_refused(saved, "classifiers.0.bias has 3 outputs, but num_labels or the task requires 2")


def test_a_missing_parameter_of_the_encoder_is_an_error(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    save_file(tensors, checkpoint / "model.safetensors")
    assert_refused(
        checkpoint, r"lacks 1 of the encoder's parameters \(encoder.layer.1.output.dense"
    )


@pytest.mark.parametrize("num_bytes", [0, 5, 2000])
def test_a_truncated_safetensors_file_is_refused(checkpoint, num_bytes):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:num_bytes])
    assert_refused(checkpoint, "model.safetensors is damaged or not a weight file")


def test_a_truncated_flax_file_is_refused(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "flax_model.msgpack").write_bytes(b"\x82\xa4bert")
    assert_refused(checkpoint, "flax_model.msgpack is damaged or not a weight file")


def test_an_index_whose_shards_are_missing_is_refused(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert_refused(checkpoint, "refers to model-1.safetensors, which is missing")
    index.write_text("{}")
    assert_refused(checkpoint, "is not an index of weight files")


def test_a_path_that_is_not_a_checkpoint_is_refused(checkpoint, tmp_path):
    (checkpoint / "model.safetensors").unlink()
    assert_refused(
        checkpoint, "it has none of model.safetensors, flax_model.msgpack, pytorch_model.bin"
    )
    (checkpoint / "config.json").write_text("{")
    assert_refused(checkpoint, "config.json is not JSON")
    (checkpoint / "config.json").write_text("[]")
    assert_refused(checkpoint, "does not hold a JSON object")
    (checkpoint / "config.json").unlink()
    assert_refused(checkpoint, "is not a checkpoint: it has no config.json")
    assert_refused(tmp_path / "absent", "there is no directory")
    file = tmp_path / "file"
    file.write_text("")
    assert_refused(file, "is a file; a checkpoint is a directory")


def test_a_checkpoint_without_a_tokenizer_is_refused(checkpoint):
    (checkpoint / "vocab.txt").unlink()
    assert_refused(checkpoint, "holds no tokenizer")


def test_a_token_id_outside_the_models_vocabulary_is_refused(checkpoint):
    (checkpoint / "vocab.txt").write_text("\n".join(f"word{i}" for i in range(9)) + "\nfilm\n")
    classifier = EarlyExitClassifier.from_pretrained(str(checkpoint), num_labels=2)
    with pytest.raises(InputError, match="vocabulary has 7 tokens; use the tokenizer that belongs"):
        classifier.predict(["film"])


def test_without_pytorch_the_message_names_the_extra_to_install(checkpoint, monkeypatch):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    assert_refused(checkpoint, r"needs PyTorch; install pabee_jax\[torch\]")


def test_the_revision_of_a_hub_id_reaches_the_hub(monkeypatch, tmp_path):
    calls = []

    def model_info(self, hub_id, revision, timeout):
        calls.append((hub_id, revision))
        files = [SimpleNamespace(rfilename=name) for name in ("config.json", "model.safetensors")]
        return SimpleNamespace(siblings=files)

    def snapshot_download(hub_id, revision, allow_patterns):
        calls.append((hub_id, revision))
        return str(tmp_path)

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve("owner/name", "v1") == tmp_path
    assert calls == [("owner/name", "v1")] * 2


def test_a_revision_of_a_directory_is_refused(tmp_path):
    with pytest.raises(InputError, match="revision is 'v1', but .* is a directory"):
        resolve(str(tmp_path), "v1")


def test_a_hub_id_without_a_network_is_refused_within_10_seconds(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    start = time.monotonic()
    with pytest.raises(InputError, match="give the path of a local directory"):
        resolve("nobody/has-this-model")
    assert time.monotonic() - start < 10


def test_missing_parameters_and_unused_tensors_are_logged_by_name(checkpoint, caplog):
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["cls.predictions.bias"] = np.zeros(3, np.float32)
    del tensors["bert.pooler.dense.bias"]
    save_file(tensors, checkpoint / "model.safetensors")
    EarlyExitClassifier.from_pretrained(str(checkpoint), num_labels=2)
    assert "pooler.dense.bias" in caplog.text and "initialized from scratch" in caplog.text
    assert "has unused tensors: cls.predictions.bias" in caplog.text


QUERY = "bert.encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda values: values * np.nan, "query.weight holds values that are not finite"),
        (lambda values: np.where(values == values.max(), np.inf, values), "not finite"),
        (lambda values: values.astype(np.int8), "query.weight holds int8 values"),
        (lambda values: values > 0, "query.weight holds bool values"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(checkpoint, damage, message):
    tensors = load_file(checkpoint / "model.safetensors")
    save_file(tensors | {QUERY: damage(tensors[QUERY])}, checkpoint / "model.safetensors")
    assert_refused(checkpoint, message)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "parts/one.safetensors"])
def test_a_shard_outside_the_directory_is_refused(checkpoint, shard):
    (checkpoint / "model.safetensors").unlink()
    index = json.dumps({"weight_map": {QUERY: shard}})
    (checkpoint / "model.safetensors.index.json").write_text(index)
    assert_refused(checkpoint, "must be in the same directory")
