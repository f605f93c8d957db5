"""`pabee-jax convert`, and the ONNX model in ONNX Runtime."""

import json

import numpy as np
import pytest

from helpers import random_batch, tiny_checkpoint, tiny_model
from pabee_jax import EarlyExitClassifier, InputError, MaxProbability, Patience
from pabee_jax.checkpoints.files import read_tensors
from pabee_jax.checkpoints.plain import save_plain
from pabee_jax.checkpoints.pretrained import Pretrained
from pabee_jax.commands.convert import convert
from pabee_jax.commands.convert_options import ConvertOptions
from pabee_jax.data.tokenization import load_tokenizer
from pabee_jax.inference.artifact import thresholds
from pabee_jax.inference.onnx_model import export_onnx

WORDS = ["good", "fine", "bad", "dull"]
TEXTS = ["good", "bad and dull"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert")
    plain = tiny_checkpoint(folder / "encoder", WORDS, num_hidden_layers=3, initializer_range=0.3)
    classifier = EarlyExitClassifier.from_pretrained(
        str(plain), num_labels=2, criterion=Patience(1)
    )
    classifier.save_pretrained(folder / "checkpoint")
    return folder / "checkpoint"


def test_a_plain_classifier_is_cut_at_an_exit(checkpoint, tmp_path, capsys):
    output = tmp_path / "plain"
    convert(ConvertOptions(str(checkpoint), str(output), "plain", exit=2))
    assert capsys.readouterr().out == f"wrote {output}\n"
    values = json.loads((output / "config.json").read_text())
    assert values["architectures"] == ["BertForSequenceClassification"]
    assert values["num_hidden_layers"] == 2 and "early_exit" not in values
    expected = EarlyExitClassifier.from_pretrained(str(checkpoint)).all_exit_logits(TEXTS)
    plain = EarlyExitClassifier.from_pretrained(str(output)).all_exit_logits(TEXTS)
    np.testing.assert_allclose(plain[-1], expected[1], atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "albert", "roberta"])
def test_a_flax_classifier_has_the_logits_of_its_exit(family, tmp_path):
    """Read by our own reader, which the files of Hugging Face's Flax classes test."""
    model = tiny_model(family, num_hidden_layers=3)
    values = {"model_type": family, "vocab_size": 60}
    directory = tiny_checkpoint(tmp_path / "tokenizer", WORDS)
    tokenizer = load_tokenizer(directory)
    pretrained = Pretrained(model, tokenizer, values, ("a", "b", "c"), 12)
    save_plain(pretrained, tmp_path / "flax", 2, flax=True)
    assert not (tmp_path / "flax" / "model.safetensors").exists()
    save_plain(pretrained, tmp_path / "plain", 2)
    expected = read_tensors(tmp_path / "plain")
    tensors = read_tensors(tmp_path / "flax")
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(tensors[name], value, err_msg=name)


def test_modernbert_has_no_flax_class(tmp_path):
    pretrained = Pretrained(
        tiny_model("modernbert", num_hidden_layers=2), None, {"model_type": "modernbert"}, (), 12
    )
    with pytest.raises(InputError, match="no Flax class for modernbert; it has one for Bert,"):
        save_plain(pretrained, tmp_path / "flax", 1, flax=True)


def test_a_checkpoint_of_pytorch_pabee_has_the_same_weights(checkpoint, tmp_path):
    output = tmp_path / "pabee"
    convert(ConvertOptions(str(checkpoint), str(output), "pytorch-pabee"))
    np.testing.assert_array_equal(
        EarlyExitClassifier.from_pretrained(str(output)).all_exit_logits(TEXTS),
        EarlyExitClassifier.from_pretrained(str(checkpoint)).all_exit_logits(TEXTS),
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"to": ""}, "--to is missing"),
        ({"to": "tf"}, "--to is 'tf'; it must be one of plain, flax, pytorch-pabee, onnx"),
        ({"exit": 0}, "exit is 0; the model has the exits 1 to 3"),
        ({"exit": 4}, "exit is 4; the model has the exits 1 to 3"),
        ({"to": "onnx", "exit": 1}, "--exit has no effect without --to plain or flax"),
        ({"sequence_length": 8}, "--sequence_length has no effect without --to onnx"),
        ({"checkpoint": "nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_be_converted_is_refused_with_one_sentence(
    checkpoint, values, message, tmp_path
):
    output = tmp_path / "output"
    values = {"checkpoint": str(checkpoint), "output": str(output), "to": "plain"} | values
    with pytest.raises(InputError, match=message):
        convert(ConvertOptions(**values))
    assert not output.exists()


def test_an_existing_target_is_left_alone(checkpoint, tmp_path):
    with pytest.raises(InputError, match="exists already"):
        convert(ConvertOptions(str(checkpoint), str(tmp_path), "plain"))
    assert not list(tmp_path.iterdir())


def test_exits_that_read_the_mean_have_no_plain_head(tmp_path):
    model = tiny_model("bert", exit_pooling="mean", num_hidden_layers=2)
    values = {"model_type": "bert"}
    with pytest.raises(InputError, match="the exits read the mean over the tokens, but"):
        save_plain(Pretrained(model, None, values, ("a", "b", "c"), 12), tmp_path / "plain", 1)
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize("length", [-3, 0, 999])
def test_an_onnx_model_has_a_possible_number_of_tokens(length, tmp_path):
    pytest.importorskip("jax2onnx")
    model = tiny_model("bert", num_hidden_layers=2)
    classifier = EarlyExitClassifier(Pretrained(model, None, {}, ("a", "b", "c"), 12))
    with pytest.raises(InputError, match="sequence_length"):
        export_onnx(classifier, tmp_path / "onnx", length)
    assert not (tmp_path / "onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize("criterion", [Patience(1), MaxProbability(0.6)])
@pytest.mark.parametrize("family", ["bert", "albert", "mpnet", "modernbert"])
def test_onnx_runtime_gives_every_row_the_same_exit(family, criterion, tmp_path):
    """The patience or threshold is an input; the other inputs are int64, for any number of rows."""
    pytest.importorskip("jax2onnx")
    import onnxruntime

    model = tiny_model(family, num_hidden_layers=5)
    pretrained = Pretrained(model, None, {}, ("a", "b", "c"), 12)
    classifier = EarlyExitClassifier(pretrained, criterion=criterion)
    export_onnx(classifier, tmp_path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options)
    names = {value.name for value in session.get_inputs()}
    for rows in (1, 7):
        batch = random_batch(rows, seed=rows)
        if model.config.type_vocab_size < 2:
            batch["token_type_ids"] *= 0
        tokens = {name: value.astype(np.int64) for name, value in batch.items() if name in names}
        for setting, inputs in (
            (criterion, {}),  # The setting of the classifier is the default.
            (type(criterion)(0), thresholds(type(criterion)(0))),
        ):
            classifier.criterion = setting
            exit_layers, logits = session.run(
                None, tokens | {name: np.asarray(value) for name, value in inputs.items()}
            )
            expected = classifier.predict(batch)
            np.testing.assert_array_equal(exit_layers, expected.exit_layers)
            np.testing.assert_allclose(logits, expected.logits, atol=2e-5)


def test_without_jax2onnx_the_message_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    model = tiny_model("bert", num_hidden_layers=2)
    classifier = EarlyExitClassifier(Pretrained(model, None, {}, ("a", "b", "c"), 12))
    with pytest.raises(InputError, match=r"pip install 'pabee_jax\[onnx\]'"):
        export_onnx(classifier, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
