"""`EarlyExitClassifier`: its predictions, their order, and what it saves."""

import pickle

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks.exit_schedule import ExitSchedule
from classifiers import TEXTS, with_driver
from helpers import random_batch, tiny_model
from pabee_jax import EarlyExitClassifier, InputError, Patience, Predictions, early_exit, replay
from pabee_jax.checkpoints.pretrained import Pretrained
from pabee_jax.criteria import as_arrays
from pabee_jax.distributed import sharding
from pabee_jax.inference import classifier as classifier_module
from pabee_jax.inference import planning
from pabee_jax.inference.predictions import Prediction, predictions_of
from pabee_jax.models.encoder import EarlyExitModel


def test_loop_and_full_agree_and_a_row_exits_as_it_does_alone(classifier, directory):
    full = EarlyExitClassifier.from_pretrained(
        str(directory), criterion=Patience(1), driver="full", num_labels=3
    )
    loop_predictions, full_predictions = classifier.predict(TEXTS), full.predict(TEXTS)
    exit_layers, logits = loop_predictions.exit_layers, loop_predictions.logits
    np.testing.assert_array_equal(exit_layers, full_predictions.exit_layers)
    np.testing.assert_allclose(logits, full_predictions.logits, atol=2e-5)
    np.testing.assert_array_equal(loop_predictions.labels, logits.argmax(axis=1))
    assert loop_predictions.label_names == ("LABEL_0", "LABEL_1", "LABEL_2")
    layers_alone = [classifier.predict([text]).exit_layers[0] for text in TEXTS]
    np.testing.assert_array_equal(exit_layers, layers_alone)


@pytest.mark.parametrize(
    ("driver", "devices"),
    [
        ("loop", 8),
        ("pool", 1),
        pytest.param("auto", 1, marks=pytest.mark.slow),
        pytest.param("pool", 8, marks=pytest.mark.slow),
        pytest.param("full", 8, marks=pytest.mark.slow),
    ],
)
def test_predictions_are_in_input_order_for_any_batches(classifier, driver, devices):
    """Row r exits at entry r of the schedule: the criterion gets the row's index in the call."""
    random = np.random.default_rng(0)
    texts = [" ".join(["film"] * random.integers(1, 14)) for _ in range(61)]
    exit_layers = random.integers(1, classifier.num_layers + 1, len(texts)).astype(np.int32)
    runner = with_driver(
        classifier, driver, criterion=ExitSchedule(exit_layers), mesh=sharding.make_mesh(devices)
    )
    all_exit_logits = classifier.all_exit_logits(texts)
    expected_logits = all_exit_logits[exit_layers - 1, np.arange(len(texts))]
    for batch_size in (None, 16):
        predictions = runner.predict(texts, batch_size)
        np.testing.assert_array_equal(predictions.exit_layers, exit_layers)
        np.testing.assert_allclose(predictions.logits, expected_logits, atol=2e-5)


def test_auto_uses_the_loop_for_few_rows_and_the_pool_for_many(classifier, monkeypatch):
    programs = []

    def record(name):
        program = getattr(classifier_module, name)

        def recorded(*arguments, **options):
            programs.append(name)
            return program(*arguments, **options)

        monkeypatch.setattr(classifier_module, name, recorded)

    record("run_loop")
    record("run_pool")
    auto = with_driver(classifier, "auto")
    loop_rows = planning.loop_rows(auto.mesh)
    auto.predict(["good"] * loop_rows)
    auto.predict(["good"] * (loop_rows + 1))
    assert programs == ["run_loop", "run_pool"]


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_most_rows_exit_at_the_same_layer_in_bfloat16_and_float32(devices):
    """bfloat16 changes logits by a few percent, with every driver."""
    predictions = {}
    for dtype, driver in (("float32", "full"), ("bfloat16", "loop"), ("bfloat16", "pool")):
        config = tiny_model("bert", num_hidden_layers=4).config
        model = EarlyExitModel(config, dtype=dtype, rngs=nnx.Rngs(0))
        pretrained = Pretrained(model, None, {}, ("0", "1", "2"), 12)
        runner = EarlyExitClassifier(
            pretrained, criterion=Patience(1), driver=driver, mesh=sharding.make_mesh(devices)
        )
        predictions[dtype, driver] = runner.predict(random_batch(60))
    in_float32 = predictions.pop(("float32", "full"))
    for in_bfloat16 in predictions.values():
        assert in_bfloat16.logits.dtype == np.float32
        same_exit = in_bfloat16.exit_layers == in_float32.exit_layers
        assert same_exit.mean() > 0.85
        np.testing.assert_allclose(
            in_bfloat16.logits[same_exit], in_float32.logits[same_exit], atol=0.3
        )


def test_replay_of_all_exit_logits_equals_predict_for_every_patience(classifier):
    logits = classifier.all_exit_logits(TEXTS)
    assert logits.shape == (classifier.num_layers, len(TEXTS), 3)
    for patience in (0, 1, 2):
        classifier.criterion = Patience(patience)
        expected_layers, expected_logits = replay(Patience(patience), logits)
        predictions = classifier.predict(TEXTS)
        np.testing.assert_array_equal(predictions.exit_layers, expected_layers)
        np.testing.assert_allclose(predictions.logits, expected_logits, atol=2e-5)
    classifier.criterion = Patience(1)


def test_saving_and_loading_preserves_the_criterion_and_the_logits(classifier, tmp_path):
    classifier.save_pretrained(tmp_path / "saved")
    loaded = EarlyExitClassifier.from_pretrained(str(tmp_path / "saved"))
    assert loaded.criterion == Patience(1)
    np.testing.assert_array_equal(loaded.all_exit_logits(TEXTS), classifier.all_exit_logits(TEXTS))


@pytest.mark.slow
def test_regression_predicts_scores(directory):
    classifier = EarlyExitClassifier.from_pretrained(str(directory), num_labels=1)
    predictions = classifier.predict(TEXTS)
    assert predictions.labels.dtype == np.float32 and predictions.label_names == ()
    np.testing.assert_array_equal(predictions.labels, predictions.logits[:, 0])
    assert (predictions.exit_layers == classifier.num_layers).all()


def test_a_pickled_classifier_predicts_the_same(classifier):
    copy = pickle.loads(pickle.dumps(classifier))
    assert (copy.criterion, copy.driver) == (classifier.criterion, classifier.driver)
    before, after = classifier.predict(TEXTS), copy.predict(TEXTS)
    np.testing.assert_array_equal(after.exit_layers, before.exit_layers)
    np.testing.assert_array_equal(after.logits, before.logits)


def test_early_exit_takes_tokenized_texts(classifier):
    program = jax.jit(lambda model, batch, criterion: early_exit(model, batch, criterion))
    tokens = classifier.tokenize(TEXTS)
    exit_layers, logits = program(classifier.model, tokens, as_arrays(classifier.criterion))
    expected = classifier.predict(TEXTS)
    np.testing.assert_array_equal(exit_layers, expected.exit_layers)
    np.testing.assert_allclose(logits, expected.logits, atol=2e-5)


def test_predictions_are_a_sequence_of_named_rows():
    logits = np.log(np.float32([[1, 3], [4, 1], [1, 1]]))
    names = ("no", "yes")
    predictions = Predictions(predictions_of(logits), logits, np.array([2, 3, 5]), names)
    assert len(predictions) == 3
    assert predictions.label_strings == ["yes", "no", "no"]
    np.testing.assert_allclose(
        predictions.probabilities, [[0.25, 0.75], [0.8, 0.2], [0.5, 0.5]], rtol=1e-6
    )
    first, *_, last = predictions
    assert first == Prediction("yes", pytest.approx(0.75), 2)
    assert last == predictions[-1] == Prediction("no", pytest.approx(0.5), 5)
    assert predictions[1:].label_strings == ["no", "no"]
    assert predictions[predictions.exit_layers > 2].exit_layers.tolist() == [3, 5]
    with pytest.raises(IndexError):
        predictions[3]
    assert repr(predictions) == "Predictions(3 rows, mean exit layer 3.33)"


def test_predictions_become_a_data_frame():
    pandas = pytest.importorskip("pandas")
    logits = np.log(np.float32([[1, 3], [4, 1]]))
    predictions = Predictions(predictions_of(logits), logits, np.array([2, 3]), ("no", "yes"))
    expected = {
        "label": ["yes", "no"],
        "probability": np.float32([0.75, 0.8]),
        "exit_layer": [2, 3],
    }
    pandas.testing.assert_frame_equal(predictions.to_pandas(), pandas.DataFrame(expected))
    scores = Predictions(predictions_of(logits[:, :1]), logits[:, :1], np.array([2, 3]), ())
    assert list(scores.to_pandas().columns) == ["score", "exit_layer"]
    assert scores[1] == Prediction(pytest.approx(np.log(4)), None, 3)
    for name in ("probabilities", "label_strings"):
        with pytest.raises(InputError, match="scores are in labels"):
            getattr(scores, name)
