"""An ordinary classifier has one trained exit, its head: no other exit answers in silence."""

import csv
import json
import shutil

import numpy as np
import pytest
import transformers

from helpers import REFERENCES, tiny_checkpoint
from pabee_jax import EarlyExitClassifier, InputError, Patience, replay
from pabee_jax.checkpoints.pretrained import load_pretrained
from pabee_jax.commands.convert import convert
from pabee_jax.commands.convert_options import ConvertOptions
from pabee_jax.commands.evaluate import evaluate
from pabee_jax.commands.evaluate_options import EvaluateOptions
from pabee_jax.commands.predict import predict
from pabee_jax.commands.predict_options import PredictOptions
from pabee_jax.criteria import (
    CRITERIA,
    Consistency,
    Divergence,
    Energy,
    Ensemble,
    Entropy,
    FixedLayer,
    Margin,
    MaxProbability,
    PatientConfidence,
    Vote,
    Window,
)
from pabee_jax.data.batching import MODEL_INPUTS
from pabee_jax.data.config import FilesConfig
from pabee_jax.training.config import LossConfig, TrainConfig
from pabee_jax.training.run import train
from runs import run_config, sources  # noqa: F401

REFUSED = "never trained: only the last exit was, .* pabee-jax train --config attach"
EXPECTED = np.load(REFERENCES / "classifiers" / "bert" / "expected.npz")
ROWS = {name: EXPECTED[name] for name in MODEL_INPUTS}
LAYERS, WEIGHTS = 5, np.zeros((5, 5), np.float32)

USES_EARLY_EXITS = [
    *((Patience(patience), uses) for patience, uses in ((0, 0), (1, 1), (3, 1), (4, 0), (9, 0))),
    *((FixedLayer(layer), uses) for layer, uses in ((1, 1), (4, 1), (5, 0), (6, 0))),
    *((Entropy(0.0), 0), (Entropy(1e-6), 1), (MaxProbability(1.0), 0), (MaxProbability(0.9), 1)),
    *((Margin(1.0), 0), (Margin(0.9), 1), (Energy(-1e9), 1), (Energy(0.0), 1)),
    *((PatientConfidence(4, 1.0), 1), (PatientConfidence(5, 1.0), 0)),
    *((PatientConfidence(1, 0.0), 0), (Divergence(3, 1.0), 1), (Divergence(4, 1.0), 0)),
    # With 5 votes, the answer is the mean of all exits.
    *((Divergence(1, 0.0), 0), (Vote(1), 1), (Vote(5), 1), (Vote(6), 0)),
    *((Window(1, 3), 1), (Window(4, 5), 1), (Window(5, 5), 0), (Window(3, 2), 0)),
    # The largest sum of the first four exits is 0.1 + 0.2 + 0.3 + 0.4.
    *((Ensemble(0.99), 1), (Ensemble(1.0), 0)),
    *((Consistency(1.0, WEIGHTS), 0), (Consistency(0.4, WEIGHTS), 1)),
]


@pytest.mark.parametrize(
    ("criterion", "uses"), USES_EARLY_EXITS, ids=lambda value: str(value)[:40].split(", coeff")[0]
)
def test_a_criterion_says_whether_an_answer_may_come_from_an_early_exit(criterion, uses):
    assert criterion.uses_early_exits(LAYERS, False) == bool(uses)
    random = np.random.default_rng(0)
    for scale in (0, 1, 1000):
        logits = scale * random.normal(size=(LAYERS, 200, 3)).astype(np.float32)
        logits[:, ::2] = logits[-1, ::2]  # Exits that agree.
        exit_layers, answers = map(np.asarray, replay(criterion, logits))
        if not uses:
            assert (exit_layers == LAYERS).all()
            np.testing.assert_array_equal(answers, logits[-1])


def test_every_criterion_is_tested():
    tested = {type(criterion).__name__ for criterion, _ in USES_EARLY_EXITS}
    own = {kind for kind in CRITERIA.values() if kind.__module__.startswith("pabee_jax")}
    assert {kind.__name__ for kind in own} <= tested


def test_of_a_regression_and_of_one_layer():
    assert not Patience(1).uses_early_exits(LAYERS, True)
    assert Patience(1, 0.1).uses_early_exits(LAYERS, True)
    for criterion in (Entropy(0.5), Vote(1), Patience(1), FixedLayer(1), Energy(0.0)):
        assert not criterion.uses_early_exits(1, False)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """The recorded classifier of four layers, with a tokenizer."""
    directory = tmp_path_factory.mktemp("untrained") / "bert"
    shutil.copytree(REFERENCES / "classifiers" / "bert", directory)
    vocabulary = directory / "words.txt"
    vocabulary.write_text("[UNK]\n[PAD]\n[CLS]\n[SEP]\n[MASK]\ngood\nbad\n")
    transformers.BertTokenizerFast(str(vocabulary)).save_pretrained(directory)
    vocabulary.unlink()
    return str(directory)


def test_the_classifier_refuses_what_may_use_an_untrained_exit(bert):
    for criterion in (Patience(1), FixedLayer(1), Vote(4), MaxProbability(0.9)):
        with pytest.raises(InputError, match=REFUSED):
            EarlyExitClassifier.from_pretrained(bert, criterion=criterion)
    classifier = EarlyExitClassifier.from_pretrained(bert)
    for criterion in (Patience(0), Patience(3), Patience(7), FixedLayer(4)):
        classifier.criterion = criterion
        logits = classifier.predict(ROWS).logits
        np.testing.assert_allclose(logits, EXPECTED["logits"][-1], atol=2e-5)
    with pytest.raises(InputError, match=f"patience 2 may use exits that were {REFUSED}"):
        classifier.criterion = Patience(2)
    assert classifier.criterion == FixedLayer(4)


def test_what_is_saved_says_which_exits_were_trained(bert, tmp_path):
    EarlyExitClassifier.from_pretrained(bert).save_pretrained(tmp_path / "saved")
    values = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert values["trained_exits"] == "last"
    restored = EarlyExitClassifier.from_pretrained(tmp_path / "saved")
    logits = restored.predict(ROWS).logits
    np.testing.assert_allclose(logits, EXPECTED["logits"][-1], atol=2e-5)
    with pytest.raises(InputError, match=REFUSED):
        restored.criterion = Patience(1)
    del values["trained_exits"]  # As checkpoints of earlier versions are.
    (tmp_path / "saved" / "config.json").write_text(json.dumps(values))
    EarlyExitClassifier.from_pretrained(tmp_path / "saved", criterion=Patience(1))
    values["trained_exits"] = "some"
    (tmp_path / "saved" / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="trained_exits in config.json is 'some'; it must be one"):
        load_pretrained(tmp_path / "saved")


def test_random_exits_are_warned_about_and_not_refused(tmp_path, caplog):
    encoder = tiny_checkpoint(tmp_path / "encoder", ["good"], num_hidden_layers=4)
    classifier = EarlyExitClassifier.from_pretrained(encoder, num_labels=2, criterion=Patience(1))
    warning = "are not trained, so its predictions are random: train them with pabee-jax train"
    assert caplog.text.count(warning) == 1
    classifier.save_pretrained(tmp_path / "saved")
    restored = EarlyExitClassifier.from_pretrained(tmp_path / "saved")
    assert caplog.text.count(warning) == 2 and restored.criterion == Patience(1)
    assert restored.pretrained.trained_exits == "none"


@pytest.mark.parametrize("weights", ["linear", pytest.param("last", marks=pytest.mark.slow)])
def test_training_says_which_exits_it_trained(weights, sources, tmp_path, caplog):  # noqa: F811
    train(run_config(sources, loss=LossConfig(weights=weights)), tmp_path / "run")
    assert "predictions are random" not in caplog.text
    values = json.loads((tmp_path / "run" / "config.json").read_text())
    assert values.get("trained_exits", "all") == {"linear": "all", "last": "last"}[weights]


def write_rows(path):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], ["good", "LABEL_0"], ["bad", "LABEL_1"]])
    return str(path)


def test_predict_refuses_it_before_it_writes_anything(bert, tmp_path):
    rows, output = write_rows(tmp_path / "rows.csv"), tmp_path / "out.csv"
    for setting in ({"patience": 2}, {"criterion": "entropy:threshold=0.5"}):
        with pytest.raises(InputError, match=REFUSED):
            predict(PredictOptions(bert, (rows,), str(output), **setting))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


def test_predict_refuses_texts_without_a_tokenizer_before_it_writes_anything(tmp_path):
    rows = write_rows(tmp_path / "rows.csv")
    classifier = str(REFERENCES / "classifiers" / "bert")
    with pytest.raises(InputError, match="has no tokenizer"):
        predict(PredictOptions(classifier, (rows,), str(tmp_path / "out.csv")))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, f"patience 1 .*{REFUSED}"),  # The default is a list.
        ({"patience": "0,2"}, f"patience 2 .*{REFUSED}"),
        ({"criterion": ("margin:threshold=0.5",)}, REFUSED),
        ({"patience": "0", "sweep": True}, f"--sweep evaluates exits that were {REFUSED}"),
        ({"patience": "0", "report": True}, f"--report .* {REFUSED}"),
        ({"calibrate": True}, f"--calibrate .* {REFUSED}"),
    ],
)
def test_evaluate_refuses_it(bert, options, message, tmp_path):
    files = FilesConfig(dev=write_rows(tmp_path / "dev.csv"))
    config = TrainConfig(task="files", files=files, max_seq_length=16)
    output = {} if "calibrate" in options else {"output": str(tmp_path / "results")}
    with pytest.raises(InputError, match=message):
        evaluate(EvaluateOptions(bert, **options, **output), config)
    assert not (tmp_path / "results").exists()


def test_evaluate_at_full_depth(bert, tmp_path):
    files = FilesConfig(dev=write_rows(tmp_path / "dev.csv"))
    config = TrainConfig(task="files", files=files, max_seq_length=16)
    options = EvaluateOptions(bert, patience="0,3", output=str(tmp_path / "results"))
    evaluate(options, config)
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert [row["mean_exit_layer"] for row in results["rows"]] == [4, 4]


def test_an_exported_program_refuses_it(bert, tmp_path):
    pytest.importorskip("flatbuffers")
    from pabee_jax.export import export, load

    export(EarlyExitClassifier.from_pretrained(bert), tmp_path, sequence_length=11)
    program = load(tmp_path)
    logits = program.predict(ROWS).logits
    np.testing.assert_allclose(logits, EXPECTED["logits"][-1], atol=2e-5)
    with pytest.raises(InputError, match=REFUSED):
        program.predict(ROWS, Patience(1))


def test_the_service_refuses_it(bert):
    pytest.importorskip("fastapi")
    from pabee_jax.serving.schemas import PredictRequest
    from pabee_jax.serving.service import Service, ServiceError

    with pytest.raises(InputError, match=REFUSED):
        Service.open(bert, criterion=Patience(1))
    with pytest.raises(InputError, match="has no tokenizer"):
        Service.open(str(REFERENCES / "classifiers" / "bert"))
    service = Service.open(bert)
    try:
        with pytest.raises(ServiceError, match=REFUSED):
            service._criterion_of(PredictRequest(inputs="good", patience=1))
        assert service._criterion_of(PredictRequest(inputs="good", patience=0)) == Patience(0)
    finally:
        service.engine.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "plain", "exit": 3}, f"exit 3 was {REFUSED}"),
        ({"to": "flax", "exit": 1}, f"exit 1 was {REFUSED}"),
        ({"to": "pytorch-pabee"}, f"PyTorch PABEE would use exits that were {REFUSED}"),
    ],
)
def test_convert_refuses_it(bert, options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        convert(ConvertOptions(bert, str(tmp_path / "output"), **options))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_onnx_model_of_an_ordinary_classifier_has_no_patience(bert, tmp_path):
    pytest.importorskip("jax2onnx")
    import onnxruntime

    output = tmp_path / "onnx"
    convert(ConvertOptions(bert, str(output), "onnx", sequence_length=11))
    session = onnxruntime.InferenceSession(output / "model.onnx")
    inputs = [*session.get_inputs(), *session.get_overridable_initializers()]
    assert {value.name for value in inputs} == set(MODEL_INPUTS)
    exit_layers, logits = session.run(
        None, {name: value.astype(np.int64) for name, value in ROWS.items()}
    )
    assert set(exit_layers.tolist()) == {4}
    np.testing.assert_allclose(logits, EXPECTED["logits"][-1], atol=2e-5)
