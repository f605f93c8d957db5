"""The user's class: texts in, predictions with exit layers out."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from benchmarks.exit_schedule import ExitSchedule
from helpers import random_batch, tiny_checkpoint, tiny_model
from pabee_jax import EarlyExitClassifier, InputError, Patience, replay
from pabee_jax.checkpoints.pretrained import Pretrained
from pabee_jax.criteria import as_arrays
from pabee_jax.distributed import sharding
from pabee_jax.inference import classifier as classifier_module
from pabee_jax.inference import dispatch, planning
from pabee_jax.inference.dispatch import Job
from pabee_jax.inference.programs import run_early_exit
from pabee_jax.models.encoder import EarlyExitModel
from pabee_jax.models.parameters import split

ROOT = Path(__file__).parents[1]
TEXTS = ["a film", ("a film", "was good"), "", "the film was not good at all " * 9, "good", "bad"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A plain encoder: no classifiers yet."""
    words = ["a", "film", "was", "good", "the", "not", "at", "all", "bad"]
    # Wide enough that exits disagree.
    shape = {"num_hidden_layers": 5, "initializer_range": 0.5}
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "plain", words, **shape)


@pytest.fixture(scope="module")
def classifier(directory):
    return EarlyExitClassifier.from_pretrained(
        str(directory), criterion=Patience(1), driver="loop", num_labels=3
    )


def test_drivers_agree_in_input_order(classifier, directory):
    full = EarlyExitClassifier.from_pretrained(
        str(directory), criterion=Patience(1), driver="full", num_labels=3
    )
    one, other = classifier.predict(TEXTS), full.predict(TEXTS)
    np.testing.assert_array_equal(one.exit_layers, other.exit_layers)
    np.testing.assert_allclose(one.logits, other.logits, atol=2e-5)
    np.testing.assert_array_equal(one.labels, one.logits.argmax(axis=1))
    assert one.label_names == ("LABEL_0", "LABEL_1", "LABEL_2")
    alone = [classifier.predict([text]) for text in TEXTS]
    np.testing.assert_array_equal(one.exit_layers, [found.exit_layers[0] for found in alone])


def with_driver(classifier, driver, **settings):
    criterion = settings.pop("criterion", classifier.criterion)
    return EarlyExitClassifier(
        classifier.pretrained, criterion=criterion, driver=driver, **settings
    )


@pytest.mark.parametrize(
    ("driver", "devices"),
    [
        ("loop", 8),
        ("pool", 8),
        pytest.param("auto", 1, marks=pytest.mark.slow),
        pytest.param("pool", 1, marks=pytest.mark.slow),
        pytest.param("full", 8, marks=pytest.mark.slow),
    ],
)
def test_results_are_in_input_order_whatever_runs_together(classifier, driver, devices):
    """Row r leaves where the schedule says r leaves: the criterion sees the row's index too."""
    random = np.random.default_rng(0)
    texts = [" ".join(["film"] * random.integers(1, 14)) for _ in range(61)]
    expected = random.integers(1, classifier.num_layers + 1, len(texts)).astype(np.int32)
    runner = with_driver(
        classifier, driver, criterion=ExitSchedule(expected), mesh=sharding.make_mesh(devices)
    )
    logits = classifier.all_exit_logits(texts)
    answers = logits[expected - 1, np.arange(len(texts))]
    for batch_size in (None, 16):
        found = runner.predict(texts, batch_size)
        np.testing.assert_array_equal(found.exit_layers, expected)
        np.testing.assert_allclose(found.logits, answers, atol=2e-5)


def test_auto_takes_the_loop_for_few_rows_and_the_pool_for_many(classifier, monkeypatch):
    chunk_sizes = []

    def spy(*arguments, chunk_size, **others):
        chunk_sizes.append(chunk_size)
        return run_early_exit(*arguments, chunk_size=chunk_size, **others)

    monkeypatch.setattr(classifier_module, "run_early_exit", spy)
    auto = with_driver(classifier, "auto")
    limit = planning.backend(auto._mesh).loop_rows
    auto.predict(["good"] * limit)
    auto.predict(["good"] * (limit + 1))
    assert chunk_sizes[0] is None and chunk_sizes[1] is not None


@pytest.mark.slow
def test_two_hundred_calls_compile_no_more_programs_than_there_are_shapes(classifier):
    """With "auto", which uses both the loop and the pool."""
    runner = with_driver(classifier, "auto")
    before = run_early_exit._cache_size()
    runner.warmup(batch_size=4)
    compiled = run_early_exit._cache_size()
    assert compiled - before <= 4 * 3, "4 lengths; loops of 1 and 2 rows, a pool of 4"
    random = np.random.default_rng(1)
    for _ in range(200):
        runner.criterion = Patience(int(random.integers(0, 7)))
        lengths = random.integers(1, 60, random.integers(1, 20))
        runner.predict([" ".join(["film"] * length) for length in lengths], batch_size=4)
    assert run_early_exit._cache_size() == compiled


def test_a_pool_says_what_it_costs_and_fits_the_memory(monkeypatch):
    """Beside what the compiler itself says the program needs."""
    shape = dict(hidden_size=64, intermediate_size=256, num_attention_heads=4)
    for family, rows, length in (("bert", 96, 24), ("albert", 200, 16)):
        model = tiny_model(family, **shape)
        pretrained = Pretrained(model, None, {}, ("0", "1", "2"), length)
        runner = EarlyExitClassifier(pretrained, driver="pool", chunk_tokens=8 * length)
        stated = runner.pool_plan(rows)
        assert (stated.rows, stated.chunk_size) == (rows, 8)
        graph, parameters = split(model)
        batch = random_batch(rows, length)
        program = run_early_exit.lower(
            graph,
            sharding.make_mesh(1),
            parameters,
            batch,
            as_arrays(Patience(1)),
            np.arange(rows),
            chunk_size=8,
        )
        used = program.compile().memory_analysis()
        needed = used.temp_size_in_bytes + sum(each.nbytes for each in batch.values())
        assert 0.7 * stated.bytes_per_device <= needed <= stated.bytes_per_device
    monkeypatch.setattr(planning, "_free_bytes", lambda mesh: 2 * stated.bytes_per_device)
    fitting = runner.pool_plan()
    assert fitting.rows < planning.backend(runner._mesh).pool_rows
    assert 0 < fitting.bytes_per_device <= stated.bytes_per_device / 2
    monkeypatch.setattr(planning, "_free_bytes", lambda mesh: stated.bytes_per_device - 1)
    with pytest.raises(InputError, match="takes .* MB on each device, but only .* MB are free"):
        runner.predict(random_batch(rows, length), batch_size=rows)
    runner.predict(random_batch(3), batch_size=rows)  # Three rows take a smaller pool.


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_bfloat16_leaves_nearly_as_float32_does(devices):
    """bfloat16 moves logits by some percent; how a batch is run does not change that."""
    found = {}
    for dtype, driver in (("float32", "full"), ("bfloat16", "loop"), ("bfloat16", "pool")):
        config = tiny_model("bert").config
        model = EarlyExitModel(config, dtype=dtype, rngs=nnx.Rngs(0))
        pretrained = Pretrained(model, None, {}, ("0", "1", "2"), 12)
        runner = EarlyExitClassifier(
            pretrained, criterion=Patience(1), driver=driver, mesh=sharding.make_mesh(devices)
        )
        found[dtype, driver] = runner.predict(random_batch(60))
    exact = found.pop(("float32", "full"))
    for one in found.values():
        assert one.logits.dtype == np.float32
        assert (one.exit_layers == exact.exit_layers).mean() > 0.85
        same = one.exit_layers == exact.exit_layers
        np.testing.assert_allclose(one.logits[same], exact.logits[same], atol=0.3)


def test_the_host_prepares_the_next_batch_before_it_waits(classifier, monkeypatch):
    """Recorded: when a batch is dispatched and when a result is asked for."""
    events = []
    real = dispatch.jax.device_get
    monkeypatch.setattr(
        dispatch.jax, "device_get", lambda value: (events.append("wait"), real(value))[1]
    )

    def jobs():
        for row in range(7):
            part = classifier.tokenize(["good"])
            events.append("prepare")
            yield Job(np.array([row]), part, 1, lambda batch, row: (row, row))

    found = [rows.tolist() for rows, _ in dispatch.results(jobs(), sharding.make_mesh(1))]
    assert found == [[row] for row in range(7)]
    assert events.index("wait") == 5, "the device had nothing in front of it"


FRESH_PROCESS = """
import sys, jax
seconds = 0.0
def listen(event, duration, **_):
    global seconds
    if event == "/jax/core/compile/backend_compile_duration":
        seconds += duration
jax.monitoring.register_event_duration_secs_listener(listen)
from pabee_jax import EarlyExitClassifier
directory, cache = sys.argv[1:]
classifier = EarlyExitClassifier.from_pretrained(directory, num_labels=3, compilation_cache=cache)
classifier.predict(["good", "bad"])
print("seconds in the compiler:", seconds)
"""


@pytest.mark.slow
def test_with_the_cache_a_second_process_hardly_compiles(directory, tmp_path):
    def seconds():
        command = [sys.executable, "-c", FRESH_PROCESS, str(directory), str(tmp_path / "cache")]
        environment = {**os.environ, "XLA_FLAGS": ""}
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=ROOT, check=True
        )
        return float(done.stdout.rpartition(":")[2])

    first, second = seconds(), seconds()
    assert second <= first / 3, f"{second:.2f} s after {first:.2f} s"


def test_refuses_a_cache_that_cannot_be_written(directory, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        InputError, match="the compilation cache .* is a file; it must be a directory"
    ):
        EarlyExitClassifier.from_pretrained(
            str(directory), num_labels=2, compilation_cache=tmp_path / "file"
        )


def test_all_exit_logits_answer_every_patience(classifier):
    logits = classifier.all_exit_logits(TEXTS)
    assert logits.shape == (classifier.num_layers, len(TEXTS), 3)
    for patience in (0, 1, 2):
        classifier.criterion = Patience(patience)
        exits, answers = replay(Patience(patience), logits)
        found = classifier.predict(TEXTS)
        np.testing.assert_array_equal(found.exit_layers, exits)
        np.testing.assert_allclose(found.logits, answers, atol=2e-5)
    classifier.criterion = Patience(1)


def test_warmup_compiles_every_shape_that_predict_uses(classifier):
    classifier.warmup(batch_size=4)
    compiled = run_early_exit._cache_size()
    random = np.random.default_rng(0)
    for patience in (0, 1, 2):
        classifier.criterion = Patience(patience)
        for rows in (1, 2, 3, 5, 9):
            texts = [" ".join(["film"] * random.integers(1, 60)) for _ in range(rows)]
            classifier.predict(texts, batch_size=4)
    classifier.criterion = Patience(1)
    assert run_early_exit._cache_size() == compiled


def test_takes_tokens_with_and_without_mask(classifier):
    tokens = random_batch(5, length=9)
    tokens = {name: np.minimum(value, 5) for name, value in tokens.items()}
    whole = classifier.predict(tokens)
    assert whole.logits.shape == (5, 3)
    bare = classifier.predict({"input_ids": tokens["input_ids"].tolist()})
    ones = np.ones_like(tokens["input_ids"])
    told = classifier.predict(
        {"input_ids": tokens["input_ids"], "attention_mask": ones, "token_type_ids": 0 * ones}
    )
    np.testing.assert_array_equal(bare.logits, told.logits)


def test_a_mask_may_have_holes(classifier):
    ids = np.array([[2, 4, 5, 5, 4, 3]])
    hole = np.array([[1, 1, 0, 0, 1, 1]])
    with_hole = classifier.predict({"input_ids": ids, "attention_mask": hole})
    other_ids = np.array([[2, 4, 4, 4, 4, 3]])
    same = classifier.predict({"input_ids": other_ids, "attention_mask": hole})
    np.testing.assert_allclose(with_hole.logits, same.logits, atol=1e-6)


def test_survives_saving_with_its_criterion(classifier, tmp_path):
    classifier.save_pretrained(tmp_path / "saved")
    again = EarlyExitClassifier.from_pretrained(str(tmp_path / "saved"))
    assert again.criterion == Patience(1)
    np.testing.assert_array_equal(again.all_exit_logits(TEXTS), classifier.all_exit_logits(TEXTS))


def test_regression_gives_scores(directory):
    scorer = EarlyExitClassifier.from_pretrained(str(directory), num_labels=1)
    found = scorer.predict(TEXTS)
    assert found.labels.dtype == np.float32 and found.label_names == ()
    np.testing.assert_array_equal(found.labels, found.logits[:, 0])
    assert (found.exit_layers == scorer.num_layers).all()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "the list of texts is empty"),
        ("one text", "put it in a list"),
        ([1], "input 0 is neither a text nor a pair"),
        ([("a", "b", "c")], "input 0 is neither a text nor a pair"),
        ({}, "needs input_ids"),
        ({"input_ids": [[10_000]]}, "input_ids must be from 0 to"),
        ({"input_ids": [[-1]]}, "input_ids must be from 0 to"),
        ({"input_ids": [[1]], "token_type_ids": [[2]]}, "token_type_ids must be from 0 to 1"),
        ({"input_ids": [[1]], "attention_mask": [[0]]}, "masks every token of row 0"),
        ({"input_ids": [[1]], "attention_mask": [[1, 1]]}, "must be an .N, S. array"),
        ({"input_ids": [[1, 2], [3]]}, "must have one length"),
        ({"input_ids": [1]}, "must be an .N, S. array"),
        ({"input_ids": [[0.5]]}, "array of integers"),
        ({"input_ids": np.zeros((0, 4), int)}, "nothing to predict"),
        ({"input_ids": np.zeros((1, 33), int)}, "33 columns, but the model has 32 positions"),
    ],
)
def test_refuses_inputs_in_one_sentence(classifier, inputs, message):
    with pytest.raises(InputError, match=message):
        classifier.predict(inputs)


def test_refuses_bad_settings(directory):
    load = EarlyExitClassifier.from_pretrained
    with pytest.raises(InputError, match="no internal classifiers yet: give num_labels="):
        load(str(directory))
    with pytest.raises(InputError, match="unknown driver 'fast'; known are auto, full, loop, pool"):
        load(str(directory), num_labels=2, driver="fast")
    with pytest.raises(InputError, match="dtype is 'float8'"):
        load(str(directory), num_labels=2, dtype="float8")
    with pytest.raises(InputError, match="num_labels must be at least 1"):
        load(str(directory), num_labels=0)
    with pytest.raises(InputError, match="batch_size must be at least 1"):
        load(str(directory), num_labels=2).predict(["a"], batch_size=0)
    with pytest.raises(InputError, match="batch_size must be at least 1"):
        load(str(directory), num_labels=2, driver="pool").pool_plan(-1)
    with pytest.raises(InputError, match="batch_size must be a whole number, not '8'"):
        load(str(directory), num_labels=2).predict(["a"], batch_size="8")
    with pytest.raises(InputError, match="sequence_length must be at least 1, not 0"):
        load(str(directory), num_labels=2).pool_plan(sequence_length=0)
    with pytest.raises(InputError, match="chunk_tokens must be at least 1, not 0"):
        load(str(directory), num_labels=2, chunk_tokens=0)
