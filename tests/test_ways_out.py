"""Every kind of exits that a preset trains, through every way out of a checkpoint.

The expected values are hidden states of `transformers` with PyTorch, and exits in NumPy. The rows
have 3 to 24 tokens, the most that the model takes.
"""

import asyncio
import dataclasses
import importlib.util
import itertools

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

from helpers import tiny_checkpoint
from pabee_jax import EarlyExitClassifier, InputError, Patience
from pabee_jax.checkpoints.pretrained import load_pretrained
from pabee_jax.checkpoints.saving import save_pretrained
from pabee_jax.commands.convert import convert
from pabee_jax.commands.convert_options import ConvertOptions
from pabee_jax.configs import attach, demo, files, glue
from pabee_jax.integrations.ray import Predictor
from pabee_jax.models.config import EXIT_CHOICES

torch = pytest.importorskip("torch")

WORDS = ["good", "fine", "bad", "dull", "film", "plot", "the", "a"]
LENGTH, LAYERS = 24, 3
TEXTS = [
    " ".join(WORDS[(row * row + 3 * place) % 8] for place in range(row))
    for row in range(1, LENGTH - 1)
]
PRESETS = [
    files.get_config(),
    files.get_config("paper"),
    glue.get_config("mrpc"),
    glue.get_config("mrpc,recommended"),
    attach.get_config(),
    demo.get_config(),
]
RECOMMENDED = ("per_exit", "mean")
KINDS = {*itertools.product(*EXIT_CHOICES.values())}
# In the default tests, the exits of the recommended recipe. A run may also have a shared pooler
# that reads the mean.
PARAMETERS = [
    RECOMMENDED,
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in sorted(KINDS - {RECOMMENDED})),
]


def test_the_kinds_are_those_of_the_presets():
    assert {(preset.pooler, preset.pooling) for preset in PRESETS} <= KINDS
    assert (PRESETS[0].pooler, PRESETS[0].pooling) == RECOMMENDED


@dataclasses.dataclass
class Case:
    """A checkpoint, its rows, and what every exit says of them."""

    kind: tuple[str, str]
    directory: str
    tokens: dict[str, np.ndarray]
    exit_logits: np.ndarray

    def expected(self, patience):
        """Return exit layers and logits by the paper's algorithm."""
        layers, answers = [], []
        for logits in self.exit_logits.swapaxes(0, 1):
            classes, agreements, layer = logits.argmax(axis=1), 0, 1
            while layer < LAYERS and not (patience and agreements == patience):
                agreements = agreements + 1 if classes[layer] == classes[layer - 1] else 0
                layer += 1
            layers.append(layer)
            answers.append(logits[layer - 1])
        return np.array(layers), np.array(answers)

    def check(self, exit_layers, logits, patience=1):
        expected_layers, expected_logits = self.expected(patience)
        assert len({*expected_layers.tolist()}) > 1 or patience == 0, "choose another seed"
        np.testing.assert_array_equal(exit_layers, expected_layers)
        np.testing.assert_allclose(logits, expected_logits, atol=1e-4)


@pytest.fixture(scope="module", params=PARAMETERS, ids="-".join)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ways")
    fields = {"num_hidden_layers": LAYERS, "initializer_range": 0.4}
    encoder = tiny_checkpoint(folder / "encoder", WORDS, max_position_embeddings=LENGTH, **fields)
    exits = dict(zip(EXIT_CHOICES, request.param, strict=True))
    pretrained = load_pretrained(encoder, num_labels=3, exits=exits)
    model = pretrained.model
    if request.param[0] == "per_exit":  # Poolers that differ, as after training.
        noise = np.random.default_rng(0).normal(scale=0.3, size=model.pooler.kernel.shape)
        model.pooler.kernel.set_value(model.pooler.kernel[...] + noise.astype(np.float32))
    pretrained = dataclasses.replace(pretrained, criterion=Patience(1), trained_exits="all")
    checkpoint = folder / "checkpoint"
    save_pretrained(pretrained, checkpoint)
    tokenizer = transformers.BertTokenizerFast.from_pretrained(encoder)
    tokens = tokenizer(TEXTS, padding="max_length", max_length=LENGTH, return_tensors="np")
    assert {*tokens["attention_mask"].sum(axis=1)} == {*range(3, LENGTH + 1)}
    # Without biases of this kind, an exit would predict one class for all rows.
    means = reference_logits(encoder, checkpoint, tokens, request.param).mean(axis=1)
    model.classifiers.bias.set_value(model.classifiers.bias[...] - means.astype(np.float32))
    save_pretrained(pretrained, checkpoint)
    logits = reference_logits(encoder, checkpoint, tokens, request.param)
    return Case(request.param, str(checkpoint), dict(tokens), logits)


def reference_logits(encoder, checkpoint, tokens, kind):
    model = transformers.BertModel.from_pretrained(encoder).eval()
    with torch.no_grad():
        inputs = {name: torch.tensor(value) for name, value in tokens.items()}
        states = model(**inputs, output_hidden_states=True).hidden_states[1:]
    tensors = load_file(checkpoint / "model.safetensors")
    classifiers = "classifiers" if kind == ("shared", "cls") else "exit_classifiers"
    shared = "exit_pooler" if kind[1] == "mean" else "bert.pooler.dense"
    if f"{shared}.weight" not in tensors:
        shared = "bert.pooler.dense"
    mask = tokens["attention_mask"][:, :, None]
    result = []
    for exit, state in enumerate(states):
        hidden = state.numpy().astype(np.float64)
        features = hidden[:, 0]
        if kind[1] == "mean":
            features = (hidden * mask).sum(axis=1) / mask.sum(axis=1)
        pooler = f"exit_poolers.{exit}" if kind[0] == "per_exit" else shared
        pooled = np.tanh(features @ tensors[f"{pooler}.weight"].T + tensors[f"{pooler}.bias"])
        name = f"{classifiers}.{exit}"
        result.append(pooled @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"])
    return np.array(result)


def test_the_classifier(case):
    classifier = EarlyExitClassifier.from_pretrained(case.directory)
    predictions = classifier.predict(TEXTS)
    case.check(predictions.exit_layers, predictions.logits)
    np.testing.assert_allclose(classifier.all_exit_logits(TEXTS), case.exit_logits, atol=1e-4)


def test_the_exported_program(case, tmp_path):
    pytest.importorskip("flatbuffers")
    from pabee_jax.export import export, load

    export(EarlyExitClassifier.from_pretrained(case.directory), tmp_path, platforms=["cpu"])
    program = load(tmp_path)
    for patience in (1, 0):
        predictions = program.predict(case.tokens, Patience(patience))
        case.check(predictions.exit_layers, predictions.logits, patience)


def test_the_service(case):
    pytest.importorskip("fastapi")
    from pabee_jax.serving.schemas import PredictRequest
    from pabee_jax.serving.service import Limits, Service

    service = Service.open(case.directory, limits=Limits(max_client_batch_size=len(TEXTS)))
    request = PredictRequest(inputs=[[text] for text in TEXTS], raw_scores=True)
    try:
        answers, headers = asyncio.run(service.predict(request))
    finally:
        service.engine.close()
    logits = [[scores[f"LABEL_{index}"] for index in range(3)] for scores in map(by_label, answers)]
    case.check(list(map(int, headers["x-exit-layers"].split(","))), logits)


def by_label(predictions):
    return {prediction.label: prediction.score for prediction in predictions}


def test_the_actor_of_ray(case):
    """The class that Ray Data runs; Ray itself is not needed."""
    columns = Predictor(case.directory)({"text": np.array(TEXTS, object)})
    exit_layers, logits = case.expected(1)
    np.testing.assert_array_equal(columns["exit_layer"], exit_layers)
    assert columns["label"].tolist() == [f"LABEL_{index}" for index in logits.argmax(axis=1)]


@pytest.fixture
def onnx_model(case, tmp_path):
    pytest.importorskip("onnxruntime")
    if importlib.util.find_spec("jax2onnx") is None:
        pytest.skip("needs jax2onnx")
    convert(ConvertOptions(case.directory, str(tmp_path / "onnx"), "onnx"))
    return tmp_path / "onnx" / "model.onnx"


def run_onnx(model, tokens, **inputs):
    import onnxruntime

    session = onnxruntime.InferenceSession(model)
    return session.run(None, {n: value.astype(np.int64) for n, value in tokens.items()} | inputs)


def test_the_onnx_model(case, onnx_model):
    case.check(*run_onnx(onnx_model, case.tokens))
    patience = np.array(0, np.int32)
    case.check(*run_onnx(onnx_model, case.tokens, patience=patience), patience=0)


@pytest.mark.parametrize("exit", [2, LAYERS])
def test_the_plain_classifier(case, exit, tmp_path):
    options = ConvertOptions(case.directory, str(tmp_path / "plain"), "plain", exit=exit)
    if case.kind[1] == "mean":
        with pytest.raises(InputError, match="reads the first token; convert --to onnx and pabee"):
            convert(options)
        assert not list(tmp_path.iterdir())
        return
    convert(options)
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "plain").eval()
    with torch.no_grad():
        inputs = {name: torch.tensor(value) for name, value in case.tokens.items()}
        logits = model(**inputs).logits.numpy()
    np.testing.assert_allclose(logits, case.exit_logits[exit - 1], atol=1e-4)
