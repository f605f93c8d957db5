"""Checkpoints as other programs write them; the logits are those that `transformers` recorded."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from helpers import REFERENCES, tiny_checkpoint
from pabee_jax import EarlyExitClassifier, InputError
from pabee_jax.checkpoints.pretrained import load_pretrained
from pabee_jax.data.batching import MODEL_INPUTS

CLASSIFIERS = REFERENCES / "classifiers"


@pytest.fixture
def bert(tmp_path):
    return copy_of("bert", tmp_path)


def copy_of(family, folder):
    """Return a copy of a recorded classifier, which has no tokenizer."""
    return shutil.copytree(CLASSIFIERS / family, folder / family)


def rename(directory, change):
    tensors = load_file(directory / "model.safetensors")
    save_file(
        {change(name): value for name, value in tensors.items()}, directory / "model.safetensors"
    )


def change_config(directory, **values):
    path = directory / "config.json"
    merged = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in merged.items() if value != "-"}))


def assert_recorded_logits(directory, family="bert", atol=2e-5):
    expected = np.load(CLASSIFIERS / family / "expected.npz")
    classifier = EarlyExitClassifier.from_pretrained(directory)
    predictions = classifier.predict({name: expected[name] for name in MODEL_INPUTS})
    np.testing.assert_allclose(predictions.logits, expected["logits"][-1], atol=atol)
    assert set(predictions.exit_layers.tolist()) == {4}


def assert_refused(directory, message, **options):
    with pytest.raises(InputError, match=message) as error:
        EarlyExitClassifier.from_pretrained(directory, **options)
    assert "\n" not in str(error.value), "an InputError's message must be one line"


WRAPPERS = ["_orig_mod.", "module.", "model.", "_orig_mod.module.", "module._orig_mod."]
WRAPPERS += ["model._orig_mod.module.", "model.model."]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_the_prefixes_of_wrappers_are_removed_in_any_combination(family, wrapper, tmp_path):
    """The names of ModernBERT's encoder start with `model.` themselves."""
    directory = copy_of(family, tmp_path)
    rename(directory, lambda name: wrapper + name)
    assert_recorded_logits(directory, family)


def test_a_prefix_between_the_head_and_the_encoder_is_removed(bert):
    """An encoder that was compiled or wrapped alone, and a family prefix that is there twice."""
    for inside in ("bert._orig_mod.", "bert.module.", "bert.bert."):
        shutil.copy(CLASSIFIERS / "bert" / "model.safetensors", bert)
        rename(bert, lambda name, inside=inside: name.replace("bert.", inside))
        assert_recorded_logits(bert)


def test_shards_with_prefixes_are_read(bert):
    rename(bert, lambda name: f"_orig_mod.{name}")
    tensors = load_file(bert / "model.safetensors")
    (bert / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, shard in shards.items():
        save_file({name: tensors[name] for name in shard}, bert / file)
    index = {"weight_map": {name: file for file, shard in shards.items() for name in shard}}
    (bert / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_recorded_logits(bert)


@pytest.mark.parametrize(("dtype", "atol"), [(np.float16, 0.01), (ml_dtypes.bfloat16, 0.1)])
def test_weights_of_16_bits_are_read(bert, dtype, atol):
    tensors = load_file(bert / "model.safetensors")
    save_file(
        {name: value.astype(dtype) for name, value in tensors.items()}, bert / "model.safetensors"
    )
    assert_recorded_logits(bert, atol=atol)


def test_an_unknown_prefix_is_named(bert):
    rename(bert, lambda name: f"net.{name}")
    assert_refused(bert, "start with 'net.bert.': rename them without this prefix", num_labels=3)


def test_two_tensors_of_one_name_are_refused(bert):
    tensors = load_file(bert / "model.safetensors")
    name = "bert.embeddings.LayerNorm.bias"
    save_file(tensors | {f"model.{name}": tensors[name]}, bert / "model.safetensors")
    assert_refused(bert, "two tensors embeddings.LayerNorm.bias: .* and .*; keep the tensors of")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("last.ckpt", "pytorch_model.bin"), ("adapter.safetensors", "model.safetensors")],
)
def test_a_file_of_weights_under_another_name_is_named(bert, name, remedy):
    (bert / "model.safetensors").rename(bert / name)
    assert_refused(bert, f"if {name} holds the weights, rename it to {remedy}")


@pytest.mark.parametrize("value", ["-", None, ""])
@pytest.mark.parametrize("family", ["bert", "distilbert", "xlm-roberta", "modernbert"])
def test_a_config_without_model_type_is_refused_with_the_line_to_add(family, value, tmp_path):
    directory = copy_of(family, tmp_path)
    change_config(directory, model_type=value)
    assert_refused(
        directory,
        rf'{family}/config.json has no model_type: add .* "model_type": "{family}"; supported are '
        "bert, albert",
    )


def test_without_architectures_the_model_type_in_the_message_is_an_example(bert):
    change_config(bert, model_type="-", architectures="-")
    assert_refused(bert, 'as in "model_type": "bert"')


@pytest.mark.parametrize(
    ("present", "missing"), [("vocab.json", "merges.txt"), ("merges.txt", "vocab.json")]
)
def test_half_a_byte_level_tokenizer_is_refused_by_the_missing_file(present, missing, tmp_path):
    directory = copy_of("roberta", tmp_path)
    contents = {"vocab.json": '{"<s>": 0, "a": 1}', "merges.txt": "#version: 0.2\n"}
    (directory / present).write_text(contents[present])
    assert_refused(directory, f"has {present}, but lacks {missing}: a byte-level tokenizer needs")


CASED = ["Paris", "Film", "film", "good", "the"]


@pytest.mark.parametrize(
    ("words", "settings", "warns"),
    [
        (CASED, {}, True),
        (CASED, {"do_lower_case": True}, True),
        (CASED, {"do_lower_case": False}, False),
        (["paris", "film", "good"], {}, False),
        (["paris", "[unused1]", "[URL]", "film"], {"do_lower_case": True}, False),
    ],
)
def test_a_cased_vocabulary_with_a_tokenizer_that_lower_cases_is_warned_about(
    words, settings, warns, tmp_path, caplog
):
    directory = tiny_checkpoint(tmp_path / "model", words)
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer"} | settings)
    )
    load_pretrained(directory, num_labels=2)
    message = 'if the model is cased, set "do_lower_case": false in tokenizer_config.json'
    assert (message in caplog.text) == warns


def with_one_output(directory, **values):
    tensors = load_file(directory / "model.safetensors")
    tensors |= {name: tensors[name][:1] for name in ("classifier.weight", "classifier.bias")}
    save_file(tensors, directory / "model.safetensors")
    change_config(directory, **values)
    return directory


@pytest.mark.parametrize(
    ("id2label", "name"),
    [({"0": "toxicity"}, "toxicity"), ("-", "LABEL_0"), ({"0": "a", "1": "b"}, "LABEL_0")],
)
def test_the_name_of_a_one_label_head_is_kept(bert, id2label, name, tmp_path):
    classifier = EarlyExitClassifier.from_pretrained(with_one_output(bert, id2label=id2label))
    assert classifier.pretrained.label_names == ()
    assert classifier.pretrained.output_names == (name,)
    classifier.save_pretrained(tmp_path / "saved")
    values = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (values["id2label"], values["label2id"]) == ({"0": name}, {name: 0})
    assert f"one score, {name} (regression)" in (tmp_path / "saved" / "README.md").read_text()
    restored = EarlyExitClassifier.from_pretrained(tmp_path / "saved")
    assert restored.pretrained.output_names == (name,)
    columns = restored.predict({"input_ids": [[3, 4]]}).columns()
    assert list(columns) == ["value", "exit_layer"]


def test_a_new_regression_has_a_score(tmp_path):
    directory = tiny_checkpoint(tmp_path / "encoder", ["a"])
    assert load_pretrained(directory, num_labels=1).output_names == ("score",)


def test_the_name_of_a_one_label_head_is_not_a_list(bert):
    with_one_output(bert, id2label={"0": ["toxicity"]})
    assert_refused(bert, "names class 0 .*; the name must be a string")


def test_without_a_tokenizer_tokens_are_predicted_and_texts_are_refused(bert, tmp_path, caplog):
    assert_recorded_logits(bert)
    assert "has no tokenizer: it takes tokenized rows, but no texts" in caplog.text
    classifier = EarlyExitClassifier.from_pretrained(bert)
    expected = np.load(CLASSIFIERS / "bert" / "expected.npz")
    rows = {name: expected[name] for name in MODEL_INPUTS}
    logits = classifier.all_exit_logits(rows)
    np.testing.assert_allclose(logits[-1], expected["logits"][-1], atol=2e-5)
    assert len(classifier.tokenize(rows)) == 4 and classifier.pretrained.with_max_length(9)
    for call in (classifier.predict, classifier.tokenize, classifier.all_exit_logits):
        with pytest.raises(InputError, match="has no tokenizer, which texts need: add its files"):
            call(["a text"])
    classifier.save_pretrained(tmp_path / "saved")
    assert_recorded_logits(tmp_path / "saved")
