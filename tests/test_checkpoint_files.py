"""Error messages for checkpoints that cannot be loaded."""

import json
import math
import time
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from helpers import tiny_checkpoint
from pabee_jax import EarlyExitClassifier, InputError
from pabee_jax.checkpoints.files import resolve
from pabee_jax.checkpoints.pretrained import load_pretrained
from pabee_jax.models.config import ModelConfig

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


def test_an_architecture_that_is_not_supported_is_refused(checkpoint):
    change_config(checkpoint, model_type="deberta-v2")
    assert_refused(checkpoint, "model type is 'deberta-v2'; supported are bert, albert, roberta,")


@pytest.mark.parametrize("name", ["is_decoder", "add_cross_attention"])
def test_a_decoder_is_refused(name, checkpoint):
    change_config(checkpoint, **{name: True})
    assert_refused(checkpoint, f"{name} is true; only encoders")


def test_a_checkpoint_of_another_family_than_its_config_is_refused(checkpoint):
    change_config(checkpoint, model_type="roberta", pad_token_id=0)
    assert_refused(checkpoint, r"names of bert\.\*, but config.json .* are roberta\.\*")
    change_config(checkpoint, model_type="distilbert", dim=16, n_layers=2, n_heads=2, hidden_dim=32)
    assert_refused(checkpoint, r"names of bert\.\*, but config.json .* are distilbert\.\*")
    change_config(checkpoint, model_type="roberta", pad_token_id=None)
    assert_refused(checkpoint, "pad_token_id is None; it must be a token id")
    change_config(checkpoint, model_type="roberta", pad_token_id=31)
    assert_refused(checkpoint, "max_position_embeddings is 32; it must be at least 33")


def test_relative_position_embeddings_are_refused(checkpoint):
    change_config(checkpoint, position_embedding_type="relative_key")
    assert_refused(checkpoint, "only absolute position embeddings")


def test_an_unknown_activation_is_refused(checkpoint):
    change_config(checkpoint, hidden_act="step")
    assert_refused(checkpoint, "hidden_act 'step' is not one of gelu")


SIZES = [
    *("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size"),
    *("vocab_size", "max_position_embeddings", "type_vocab_size"),
]
ALBERT_SIZES = ["embedding_size", "num_hidden_groups", "inner_group_num"]
NO_SIZES = [-1, 0, 1e30, 10**30, "abc", "16", None, True, math.nan, math.inf, [16], {}, 16.0]
NO_RATES = [1.5, -0.1, 1.0, 10**400, "x", None, True, math.nan, []]
RATES = ["hidden_dropout_prob", "attention_probs_dropout_prob"]


def assert_config_refused(values, message):
    with pytest.raises(InputError, match=message):
        ModelConfig.from_hugging_face(values, 2)


@pytest.mark.parametrize("value", NO_SIZES, ids=str)
def test_a_value_that_is_no_size_is_refused_by_the_name_of_its_field(value):
    for name in SIZES:
        assert_config_refused({"model_type": "bert", name: value}, f"{name} is .* a whole number")
    for name in ALBERT_SIZES:
        assert_config_refused({"model_type": "albert", name: value}, f"{name} is .* a whole number")


@pytest.mark.parametrize("value", NO_RATES, ids=lambda value: str(value)[:9])
def test_a_dropout_rate_is_at_least_0_and_below_1(value):
    for name in RATES:
        assert_config_refused({"model_type": "bert", name: value}, f"{name} is .* below 1")
    values = {"model_type": "albert", "classifier_dropout_prob": value}
    assert_config_refused(values, "classifier_dropout_prob is .* from 0 to below 1")


@pytest.mark.parametrize("value", [-1, 0, 1e30, "abc", None, True, math.nan, math.inf])
def test_the_epsilon_of_layer_norm_is_above_0_and_below_1(value):
    values = {"model_type": "bert", "layer_norm_eps": value}
    assert_config_refused(values, "layer_norm_eps is .* above 0 and below 1")


def test_bert_ignores_the_sizes_that_only_albert_has():
    values = {"model_type": "bert", **dict.fromkeys(ALBERT_SIZES, "abc")}
    assert ModelConfig.from_hugging_face(values, 2).inner_group_num == 1


@pytest.mark.parametrize("value", [3, [], {}, None])
def test_an_activation_that_is_no_name_is_refused(value):
    assert_config_refused({"model_type": "bert", "hidden_act": value}, "hidden_act")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hidden_size", 18, r"LayerNorm.bias has shape \(16,\), but config.json requires \(18,\)"),
        ("vocab_size", 2**31 - 1, r"has shape \(7, 16\), .* requires \(2147483647, 16\)"),
        ("num_hidden_layers", 999, "describes 999 layers .* the weights are only 39 tensors"),
        ("num_hidden_layers", 3, "lacks 16 of the encoder's parameters"),
        ("type_vocab_size", 1, r"token_type_embeddings.weight has shape \(2, 16\), .* \(1, 16\)"),
        ("max_position_embeddings", 64, r"position_embeddings.weight has shape \(32, 16\)"),
    ],
)
def test_sizes_that_disagree_with_a_tensor_name_it_and_both_shapes(
    checkpoint, name, value, message
):
    change_config(checkpoint, **{name: value})
    assert_refused(checkpoint, message)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("abc", "an exit criterion is 'abc'; it must be an object"),
        ([], "an exit criterion is "),
        (3, "an exit criterion is 3"),
        ([["criterion", "patience"], ["patience", 1]], "it must be an object"),
        ({}, "unknown exit criterion None"),
        ({"criterion": 3}, "unknown exit criterion 3"),
        ({"criterion": ["patience"]}, "unknown exit criterion .'patience'."),
        ({"criterion": "patience"}, "missing 1 required"),
        ({"criterion": "patience", "patience": None}, "patience is None; it must be a number"),
        ({"criterion": "patience", "patience": [1]}, "patience is .1.; it must be a number"),
        ({"criterion": "patience", "patience": {"a": 1}}, "it must be a number"),
        ({"criterion": "patience", "patience": 1, "odd": 2}, "does not fit its class"),
        ({"criterion": "entropy", "threshold": 10**400}, "a number from 0 to 1"),
        ({"criterion": "entropy", "threshold": math.nan}, "a number from 0 to 1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_odd_criterion_in_config_json_is_refused(checkpoint, value, message):
    change_config(checkpoint, early_exit=value)
    assert_refused(checkpoint, f"early_exit in config.json: .*{message}")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["no", "yes"], "it must map class ids to names"),
        ("abc", "it must map class ids to names"),
        ({"no": 0, "yes": 1}, "it must map class ids to names"),
        ({"1": "no", "2": "yes"}, "has 2 names, but not of class 0"),
        ({"0": "no", "1": None}, "names class 1 None; the name must be a string"),
        ({"0": ["no"], "1": "yes"}, "names class 0 .*; the name must be a string"),
        ({"0": "\ud800", "1": "yes"}, "names class 0 .*; the name must be a string"),
    ],
)
def test_odd_label_names_in_config_json_are_refused(checkpoint, value, message):
    change_config(checkpoint, id2label=value)
    assert_refused(checkpoint, f"id2label in config.json .*{message}")


def test_a_number_is_a_label_name_and_names_of_other_labels_are_ignored(checkpoint):
    for names, expected in {
        (3, 4): ("3", "4"),
        tuple(f"name {i}" for i in range(5000)): ("LABEL_0", "LABEL_1"),
    }.items():
        change_config(checkpoint, id2label={str(i): name for i, name in enumerate(names)})
        assert load_pretrained(str(checkpoint), num_labels=2).label_names == expected


@pytest.mark.parametrize("content", ["[" * 9999, '{"a": 1' + "0" * 5000 + "}", b"\xff\xfe", b""])
def test_a_config_json_that_python_cannot_read_is_refused(checkpoint, content):
    content = content if isinstance(content, bytes) else content.encode()
    (checkpoint / "config.json").write_bytes(content)
    assert_refused(checkpoint, "config.json is not JSON")


@pytest.mark.parametrize("value", [1, 2, 0, -5, "abc", True, 8.5, [], math.nan])
def test_a_maximum_length_that_leaves_no_room_for_a_text_is_refused(checkpoint, value):
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": value}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    assert_refused(checkpoint, "model_max_length .*(it must be at least 3|be a whole number)")


@pytest.mark.parametrize("value", [1e30, None])
def test_an_unknown_maximum_length_is_the_number_of_positions(checkpoint, value):
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": value}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_pretrained(str(checkpoint), num_labels=2).max_length == 32


def test_max_seq_length_must_leave_room_for_a_text(checkpoint):
    pretrained = load_pretrained(str(checkpoint), num_labels=2)
    with pytest.raises(InputError, match="max_seq_length is 2, but it must be at least 3"):
        pretrained.with_max_length(2)


def test_an_empty_vocabulary_is_refused(checkpoint):
    for content in ("", "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n"):
        (checkpoint / "vocab.txt").write_text(content)
        assert_refused(checkpoint, "has an empty vocabulary")


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


@pytest.mark.parametrize(
    "damage",
    [
        *(lambda data, n=n: data[:n] for n in (0, 5, 8, 300, 2000, 9000, -1)),
        lambda data: b"PK" + data[2:],
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: (2**40).to_bytes(8, "little") + data[8:],
        lambda data: bytes(8) + data[8:],
        lambda data: data + b"\0",
        lambda data: data[:9] + bytes([data[9] ^ 128]) + data[10:],
    ],
)
def test_a_damaged_safetensors_file_is_refused(checkpoint, damage):
    path = checkpoint / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
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
