"""`pabee-jax convert`, and the ONNX model in ONNX Runtime."""

import json
import shutil

import numpy as np
import pytest
import transformers

from helpers import REFERENCES, random_batch, tiny_checkpoint, tiny_model
from pabee_jax import EarlyExitClassifier, InputError, MaxProbability, Patience
from pabee_jax.checkpoints import saving
from pabee_jax.checkpoints.files import read_tensors
from pabee_jax.checkpoints.plain import save_plain
from pabee_jax.checkpoints.pretrained import Pretrained
from pabee_jax.commands import convert as convert_command
from pabee_jax.commands.convert import convert
from pabee_jax.commands.convert_options import ConvertOptions
from pabee_jax.data.tokenization import load_tokenizer
from pabee_jax.inference.artifact import thresholds
from pabee_jax.inference.conversion import generated_rows
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


@pytest.mark.parametrize("to", ["plain", "pytorch-pabee", "onnx"])
def test_a_conversion_that_computes_something_else_leaves_nothing(
    checkpoint, to, tmp_path, monkeypatch
):
    """Stand-ins for a fault of a writer: one weight is another, or the file is no model."""
    if to == "onnx":
        pytest.importorskip("onnxruntime")
    write = saving.save

    def write_another(tensors, metadata):
        name = next(name for name in tensors if name.endswith("layer.0.output.dense.weight"))
        return write(tensors | {name: tensors[name][::-1].copy()}, metadata=metadata)

    def write_no_model(classifier, directory, length):
        (directory / "model.onnx").write_bytes(b"no model")

    monkeypatch.setattr(saving, "save", write_another)
    monkeypatch.setattr(convert_command, "export_onnx", write_no_model)
    (tmp_path / "mine").write_text("mine")
    message = "ONNX Runtime cannot open the model" if to == "onnx" else "logits of the .* differ"
    with pytest.raises(InputError, match=message):
        convert(ConvertOptions(str(checkpoint), str(tmp_path / "new" / "output"), to))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


class _Session:
    """Stands in for ONNX Runtime with a model whose rows all exit at layer 1."""

    def __init__(self, path, options):
        self.logits = np.zeros((8, 2), np.float32)

    def get_inputs(self):
        return []

    get_overridable_initializers = get_inputs

    def run(self, outputs, inputs):
        return np.ones(len(self.logits), np.int32), self.logits


def test_an_onnx_model_with_other_exit_layers_is_discarded(checkpoint, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnxruntime, "InferenceSession", _Session)
    monkeypatch.setattr(convert_command, "export_onnx", lambda *arguments: None)
    with pytest.raises(InputError, match="patience 1, rows exit at other layers in ONNX Runtime"):
        convert(ConvertOptions(str(checkpoint), str(tmp_path / "output"), "onnx"))
    assert not list(tmp_path.iterdir())


def test_without_onnx_runtime_a_warning_says_that_nothing_was_compared(
    checkpoint, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(convert_command, "export_onnx", lambda *arguments: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    convert(ConvertOptions(str(checkpoint), str(tmp_path / "output"), "onnx"))
    assert "onnxruntime is not installed: the model was not compared" in caplog.text


@pytest.mark.parametrize(
    ("family", "pooling"),
    [
        ("modernbert", "mean"),
        *(
            pytest.param(family, pooling, marks=pytest.mark.slow)
            for family in ("roberta", "mpnet", "modernbert", "distilbert")
            for pooling in ("cls", "mean")
            if (family, pooling) != ("modernbert", "mean")
        ),
    ],
)
def test_a_head_of_transformers_survives_the_conversion(family, pooling, tmp_path):
    """With PyTorch. Only ModernBERT has the field `classifier_pooling`; others ignore it."""
    torch = pytest.importorskip("torch")
    source = shutil.copytree(REFERENCES / "classifiers" / family, tmp_path / "source")
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(values | {"classifier_pooling": pooling}))
    convert(ConvertOptions(str(source), str(tmp_path / "plain"), "plain"))
    expected = np.load(source / "expected.npz")
    tokens = {name: torch.tensor(expected[name]) for name in ("input_ids", "attention_mask")}
    before, after = (
        transformers.AutoModelForSequenceClassification.from_pretrained(directory).eval()
        for directory in (source, tmp_path / "plain")
    )
    assert not (tmp_path / "plain" / "tokenizer.json").exists()
    with torch.no_grad():
        difference = (before(**tokens).logits - after(**tokens).logits).abs().max()
    assert difference < 2e-5


def test_generated_rows_have_every_length_to_the_longest():
    """And the padding id of RoBERTa, 1, at padding positions alone."""
    for family, length in (("roberta", 22), ("bert", 24), ("bert", 1)):
        pretrained = Pretrained(tiny_model(family), None, {}, ("a", "b", "c"), length)
        rows = generated_rows(pretrained, length)
        lengths = rows["attention_mask"].sum(axis=1)
        assert {1, max(1, length - 1), length} <= {*lengths} and lengths.min() == 1
        if family == "roberta":
            np.testing.assert_array_equal(rows["input_ids"] != 1, rows["attention_mask"] == 1)
        assert rows["input_ids"].max() < 60 and rows["input_ids"].shape == (8, length)


def test_an_existing_target_is_left_alone(checkpoint, tmp_path):
    with pytest.raises(InputError, match="exists already"):
        convert(ConvertOptions(str(checkpoint), str(tmp_path), "plain"))
    assert not list(tmp_path.iterdir())


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
