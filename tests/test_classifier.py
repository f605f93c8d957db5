"""`EarlyExitClassifier`: predictions, their order, compiled programs, memory and error messages."""

import dataclasses
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks.exit_schedule import ExitSchedule
from helpers import random_batch, tiny_checkpoint, tiny_model
from pabee_jax import EarlyExitClassifier, InputError, Patience, Predictions, early_exit, replay
from pabee_jax.checkpoints.pretrained import Pretrained
from pabee_jax.criteria import as_arrays
from pabee_jax.data.dataset import Dataset
from pabee_jax.distributed import sharding
from pabee_jax.drivers import replay as replay_module
from pabee_jax.drivers.ragged import RaggedBatch
from pabee_jax.drivers.shapes import sequence_lengths
from pabee_jax.inference import classifier as classifier_module
from pabee_jax.inference import dispatch, planning
from pabee_jax.inference.dispatch import padded_job
from pabee_jax.inference.inputs import checked_tokens
from pabee_jax.inference.predictions import Prediction, predictions_of
from pabee_jax.inference.programs import run_full, run_full_pool, run_loop, run_pool
from pabee_jax.inference.row_source import row_source
from pabee_jax.models.encoder import EarlyExitModel
from pabee_jax.models.parameters import split

ROOT = Path(__file__).parents[1]
TEXTS = ["a film", ("a film", "was good"), "", "the film was not good at all " * 9, "good", "bad"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A plain encoder checkpoint without internal classifiers."""
    words = ["a", "film", "was", "good", "the", "not", "at", "all", "bad"]
    # The initializer is wide enough that exits disagree.
    config = {"num_hidden_layers": 5, "initializer_range": 0.5}
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "plain", words, **config)


@pytest.fixture(scope="module")
def classifier(directory):
    return EarlyExitClassifier.from_pretrained(
        str(directory), criterion=Patience(1), driver="loop", num_labels=3
    )


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


def with_driver(classifier, driver, **settings):
    criterion = settings.pop("criterion", classifier.criterion)
    return EarlyExitClassifier(
        classifier.pretrained, criterion=criterion, driver=driver, **settings
    )


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
def test_two_hundred_calls_after_warmup_compile_nothing(classifier):
    """With driver "auto", which uses both the loop and the pool."""
    runner = with_driver(classifier, "auto")
    before = run_loop._cache_size() + run_pool._cache_size()
    runner.warmup()
    compiled = run_loop._cache_size() + run_pool._cache_size()
    limit = runner.pretrained.max_length
    assert compiled - before <= 2 * len(sequence_lengths(limit)) + 2, (
        "warmup compiles more than loops of 1 and 2 rows, and two pools"
    )
    random = np.random.default_rng(1)
    for _ in range(200):
        runner.criterion = Patience(int(random.integers(0, 7)))
        lengths = random.integers(1, 60, random.integers(1, 20))
        texts = [" ".join(["film"] * length) for length in lengths]
        runner.predict(texts, batch_size=int(random.integers(1, 40)))
    assert run_loop._cache_size() + run_pool._cache_size() == compiled


@pytest.mark.slow
def test_three_hundred_calls_of_the_pool_need_two_programs(classifier):
    """Only two of the calls run; the test compares the shapes of all of them."""
    runner = with_driver(classifier, "pool")
    before, random = run_pool._cache_size(), np.random.default_rng(2)
    for _ in range(300):
        rows = int(random.integers(1, 400))
        length = int(random.integers(1, runner.pretrained.max_length + 1))
        tokens = {"input_ids": np.full((rows, length), 5)}
        runner.criterion = Patience(1)
        job_sizes = [
            (len(job.rows), len(job.batch["lengths"]), len(job.batch["input_ids"]))
            for job in runner._jobs(
                "pool", row_source(runner.pretrained, tokens), int(random.integers(1, 10_000))
            )
        ]
        assert sum(size for size, *_ in job_sizes) == rows
        assert {tuple(shape) for _, *shape in job_sizes} <= {
            (plan.rows, plan.tokens_per_device)
            for plan in runner._pool_plans(runner.pretrained.max_length)
        }
    runner.predict({"input_ids": np.full((3, 7), 5)})
    runner.predict({"input_ids": np.full((1200, 30), 5)}, batch_size=700)
    assert run_pool._cache_size() - before <= 2


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["auto", "full"])
def test_the_number_of_programs_is_bounded_for_any_batch_sizes(classifier, driver):
    """At most four lengths for 1 and 2 rows, and two pools; and `replay` for up to 64 rows."""
    runner, random = with_driver(classifier, driver), np.random.default_rng(0)
    programs = [run_full, run_full_pool] if driver == "full" else [run_loop, run_pool]

    def compiled():
        return sum(program._cache_size() for program in programs)

    before, replays = compiled(), replay_module._replay_one._cache_size()
    for _ in range(60):
        rows, batch_size = random.integers(1, 64, 2)
        batch = random_batch(int(rows), int(random.integers(2, 20)))
        batch = {name: np.minimum(values, 4) for name, values in batch.items()}
        predictions = runner.predict(batch, int(batch_size))
        assert len(predictions.labels) == rows
    assert compiled() - before <= 2 * 4 + 2
    assert replay_module._replay_one._cache_size() - replays <= 7


def test_the_pool_plan_predicts_the_memory_and_fits_the_free_memory(monkeypatch):
    """The test compares the plan with the compiler's memory analysis of the program."""
    shape = dict(num_hidden_layers=3, hidden_size=64, intermediate_size=256, num_attention_heads=4)
    for family, length in (("bert", 24), ("albert", 16)):
        model = tiny_model(family, **shape)
        pretrained = Pretrained(model, None, {}, ("0", "1", "2"), length)
        runner = EarlyExitClassifier(pretrained, driver="pool", chunk_tokens=256)
        plan = runner.pool_plan()
        structure, parameters = split(model)
        tokens = np.zeros(plan.tokens_per_device, np.int32)
        rows = np.zeros(plan.rows, np.int32)
        program = run_pool.lower(
            structure,
            sharding.make_mesh(1),
            parameters,
            RaggedBatch(tokens, tokens, tokens, tokens, rows),
            as_arrays(Patience(1)),
            rows,
            sizes=plan.sizes,
        )
        analysis = program.compile().memory_analysis()
        used_bytes = analysis.temp_size_in_bytes + 4 * tokens.nbytes + 2 * rows.nbytes
        assert 0.7 * plan.bytes_per_device <= used_bytes <= plan.bytes_per_device
    monkeypatch.setattr(planning, "_free_bytes", lambda mesh: 2 * plan.bytes_per_device)
    limited = EarlyExitClassifier(pretrained, driver="pool", chunk_tokens=256)
    assert limited.pool_plan().tokens < plan.tokens
    assert 0 < limited.pool_plan().bytes_per_device <= plan.bytes_per_device / 2
    batch = random_batch(700, length)  # More rows and tokens than this pool has.
    limited.criterion = runner.criterion = Patience(1)
    for predictions in (limited.predict(batch), limited.predict(batch, batch_size=10**9)):
        np.testing.assert_array_equal(predictions.labels, runner.predict(batch).labels)


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


def test_batches_are_dispatched_before_the_first_result_is_fetched(classifier, monkeypatch):
    """The test records the order of preparing batches and fetching results."""
    events = []
    device_get = dispatch.jax.device_get
    monkeypatch.setattr(
        dispatch.jax, "device_get", lambda value: (events.append("fetch"), device_get(value))[1]
    )

    def jobs():
        for row in range(7):
            part = classifier.tokenize(["good"])
            events.append("prepare")
            yield padded_job(np.array([row]), part, 1, mesh, lambda batch, row: (row, row))

    mesh = sharding.make_mesh(1)
    rows_in_order = [rows.tolist() for rows, _ in dispatch.run_jobs(jobs(), mesh)]
    assert rows_in_order == [[row] for row in range(7)]
    assert events.index("fetch") == 5, "dispatch five batches before fetching the first result"


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
def test_with_the_compilation_cache_a_second_process_compiles_in_a_third_of_the_time(
    directory, tmp_path
):
    def compile_seconds():
        command = [sys.executable, "-c", FRESH_PROCESS, str(directory), str(tmp_path / "cache")]
        environment = {**os.environ, "XLA_FLAGS": ""}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        process = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=ROOT, check=True
        )
        return float(process.stdout.rpartition(":")[2])

    first, second = compile_seconds(), compile_seconds()
    assert second <= first / 3, (
        f"compiling took {first:.2f} s with an empty cache, {second:.2f} s with a filled cache"
    )


def test_a_compilation_cache_that_is_a_file_is_an_input_error(directory, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        InputError, match="the compilation cache .* is a file; it must be a directory"
    ):
        EarlyExitClassifier.from_pretrained(
            str(directory), num_labels=2, compilation_cache=tmp_path / "file"
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


@pytest.mark.slow
def test_warmup_compiles_every_shape_that_predict_uses(classifier):
    classifier.warmup(batch_size=4)
    compiled = run_loop._cache_size()
    random = np.random.default_rng(0)
    for patience in (0, 1, 2):
        classifier.criterion = Patience(patience)
        for rows in (1, 2, 3, 5, 9):
            texts = [" ".join(["film"] * random.integers(1, 60)) for _ in range(rows)]
            classifier.predict(texts, batch_size=4)
    classifier.criterion = Patience(1)
    assert run_loop._cache_size() == compiled


@pytest.mark.parametrize("driver", ["auto", "loop", "pool", "full"])
def test_warmup_covers_every_batch_size(classifier, monkeypatch, driver):
    """The test compares shapes, for a device whose loop takes 6 rows, and compiles nothing."""
    backend = dataclasses.replace(planning._CPU, loop_rows=6)
    monkeypatch.setattr(planning, "_CPU", backend)
    runner = with_driver(classifier, driver)
    warm = set()
    monkeypatch.setattr(
        classifier_module,
        "run_jobs",
        lambda jobs, mesh: (warm.add(job.batch["input_ids"].shape) for job in jobs),
    )
    for batch_size in (1, 3, 5, 6, 7, 40, None):
        warm.clear()
        runner.warmup(batch_size)
        for rows in (*range(1, 12), 50):
            source = row_source(runner.pretrained, {"input_ids": np.full((rows, 1 + rows % 9), 5)})
            for job in runner._jobs(driver, source, batch_size):
                assert job.batch["input_ids"].shape in warm, f"{rows} rows, {batch_size}"


@pytest.mark.slow
def test_warmup_for_some_lengths_compiles_what_texts_of_these_lengths_need(directory):
    classifier = EarlyExitClassifier.from_pretrained(str(directory), num_labels=2)
    before = run_loop._cache_size()
    classifier.warmup(batch_size=1, lengths=[5, 6, 12])
    compiled = run_loop._cache_size()
    assert compiled - before == 2  # 8 and 16 tokens.
    classifier.predict(["film " * 3])  # 5 tokens with [CLS] and [SEP].
    classifier.predict(["film " * 10])
    assert run_loop._cache_size() == compiled
    classifier.predict(["film " * 18])
    assert run_loop._cache_size() == compiled + 1
    for length in (0, 10_000):
        with pytest.raises(InputError, match="lengths has"):
            classifier.warmup(lengths=[length])


@pytest.mark.parametrize("words", [1, 10, 27])
@pytest.mark.parametrize("driver", ["auto", "full"])
def test_a_single_text_pays_for_at_most_eight_more_tokens_than_it_has(words, driver, classifier):
    source = row_source(classifier.pretrained, ["film " * words])
    (job,) = classifier._jobs(driver, source, None)
    rows, length = job.batch["input_ids"].shape
    assert rows == 1 and words + 2 <= length < words + 2 + 8


def test_an_absent_mask_means_all_ones_and_absent_segments_mean_zeros(classifier):
    tokens = random_batch(5, length=9)
    tokens = {name: np.minimum(array, 5) for name, array in tokens.items()}
    assert classifier.predict(tokens).logits.shape == (5, 3)
    ids_only = classifier.predict({"input_ids": tokens["input_ids"].tolist()})
    ones = np.ones_like(tokens["input_ids"])
    explicit = classifier.predict(
        {"input_ids": tokens["input_ids"], "attention_mask": ones, "token_type_ids": 0 * ones}
    )
    np.testing.assert_array_equal(ids_only.logits, explicit.logits)


def test_tokens_masked_in_the_middle_of_a_row_do_not_change_the_logits(classifier):
    ids = np.array([[2, 4, 5, 5, 4, 3]])
    other_ids = np.array([[2, 4, 4, 4, 4, 3]])
    mask = np.array([[1, 1, 0, 0, 1, 1]])
    predictions = classifier.predict({"input_ids": ids, "attention_mask": mask})
    other_predictions = classifier.predict({"input_ids": other_ids, "attention_mask": mask})
    np.testing.assert_allclose(predictions.logits, other_predictions.logits, atol=1e-6)


def test_saving_and_loading_preserves_the_criterion_and_the_logits(classifier, tmp_path):
    classifier.save_pretrained(tmp_path / "saved")
    loaded = EarlyExitClassifier.from_pretrained(str(tmp_path / "saved"))
    assert loaded.criterion == Patience(1)
    np.testing.assert_array_equal(loaded.all_exit_logits(TEXTS), classifier.all_exit_logits(TEXTS))


def test_regression_predicts_scores(directory):
    classifier = EarlyExitClassifier.from_pretrained(str(directory), num_labels=1)
    predictions = classifier.predict(TEXTS)
    assert predictions.labels.dtype == np.float32 and predictions.label_names == ()
    np.testing.assert_array_equal(predictions.labels, predictions.logits[:, 0])
    assert (predictions.exit_layers == classifier.num_layers).all()


def dataset(ids, mask=None, labels=None):
    ids = np.asarray(ids)
    mask = np.ones(ids.shape, np.int8) if mask is None else np.asarray(mask)
    return Dataset(ids, mask, np.zeros(ids.shape, np.int8), labels)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "the list of texts is empty"),
        ("one text", "put the text in a list"),
        (("a", "b"), r"pass \[\(a, b\)\] for a pair of texts, or \[a, b\] for two texts"),
        (b"text", "takes a list of texts, not a bytes"),
        (["a", "\ud800"], "input 1 is no valid Unicode text"),
        ([("a", "\udfff")], "input 0 is no valid Unicode text"),
        ([None], "input 0 is neither a text nor a pair"),
        ([b"a"], "input 0 is neither a text nor a pair"),
        ([Path("a")], "input 0 is neither a text nor a pair"),
        ([[["a"]]], "input 0 is neither a text nor a pair"),
        ([1], "input 0 is neither a text nor a pair"),
        ([("a", "b", "c")], "input 0 is neither a text nor a pair"),
        ({}, "needs input_ids"),
        ({"input_ids": [[10_000]]}, "input_ids must be from 0 to"),
        ({"input_ids": [[-1]]}, "input_ids must be from 0 to"),
        ({"input_ids": [[1]], "token_type_ids": [[2]]}, "token_type_ids must be from 0 to 1"),
        ({"input_ids": [[1]], "attention_masks": [[1]]}, "'attention_masks', .* attention_mask;"),
        ({"input_ids": [[1]], "attention_mask": [[2]]}, "attention_mask must be from 0 to 1"),
        ({"input_ids": [[1]], "attention_mask": None}, "attention_mask must be an .N, S. array"),
        ({"input_ids": [[True]]}, "array of integers"),
        ({"input_ids": np.ones((1, 2), object)}, "array of integers"),
        ({"input_ids": [[10**30]]}, "array of integers"),
        ({"input_ids": np.zeros((4, 0), int)}, "nothing to predict"),
        (dataset([[10_000]]), "input_ids must be from 0 to"),
        (dataset([[-1]]), "input_ids must be from 0 to"),
        (dataset([[1.0]]), "array of integers"),
        (dataset(np.ones((2, 33), int)), "33 columns, but the model has 32 positions"),
        (dataset([[1, 1]], mask=[[1]]), "must be an .N, S. array"),
        (dataset([[1], [1]], mask=[[1], [0]]), "masks every token of row 1"),
        (dataset([[1], [1]], labels=[0]), "the dataset has 2 rows, but 1 labels"),
        ({"input_ids": [[1]], "attention_mask": [[0]]}, "masks every token of row 0"),
        ({"input_ids": [[1]], "attention_mask": [[1, 1]]}, "must be an .N, S. array"),
        ({"input_ids": [[1, 2], [3]]}, "must have the same length"),
        ({"input_ids": [1]}, "must be an .N, S. array"),
        ({"input_ids": [[0.5]]}, "array of integers"),
        ({"input_ids": np.zeros((0, 4), int)}, "nothing to predict"),
        ({"input_ids": np.zeros((1, 33), int)}, "33 columns, but the model has 32 positions"),
        ((text for text in ["a"]), "takes a list of texts, not a generator"),
        (None, "takes a list of texts, not a NoneType"),
        (3, "takes a list of texts, not a int"),
    ],
)
def test_wrong_inputs_are_input_errors(classifier, inputs, message):
    with pytest.raises(InputError, match=message):
        classifier.predict(inputs)


def test_a_row_does_not_depend_on_its_neighbours_if_the_tokenizer_pads_on_the_left(
    directory, tmp_path
):
    shutil.copytree(directory, tmp_path / "left")
    settings = {"tokenizer_class": "BertTokenizer", "padding_side": "left"}
    (tmp_path / "left" / "tokenizer_config.json").write_text(json.dumps(settings))
    left = EarlyExitClassifier.from_pretrained(str(tmp_path / "left"), num_labels=2, driver="loop")
    right = EarlyExitClassifier.from_pretrained(str(directory), num_labels=2, driver="loop")
    texts = ["good", "a good film " * 3]
    np.testing.assert_array_equal(left.predict(texts).logits, right.predict(texts).logits)


def test_segment_ids_above_127_are_kept():
    limits = tiny_model(type_vocab_size=300).config
    tokens = {"input_ids": [[1, 2]], "token_type_ids": [[0, 299]]}
    assert checked_tokens(tokens, limits).token_type_ids.tolist() == [[0, 299]]


def test_an_array_of_texts_is_a_list_of_texts(classifier):
    texts = ["good", "a bad film"]
    expected = classifier.predict(texts)
    np.testing.assert_array_equal(classifier.predict(np.array(texts)).logits, expected.logits)


def test_wrong_settings_are_input_errors(directory):
    load = EarlyExitClassifier.from_pretrained
    with pytest.raises(
        InputError, match="no internal classifiers yet, and no .* head: give num_labels="
    ):
        load(str(directory))
    for criterion in (3, "patience", Patience):
        with pytest.raises(InputError, match="it must be an exit criterion, such as Patience"):
            load(str(directory), num_labels=2, criterion=criterion)
    with pytest.raises(InputError, match="unknown driver 'fast'; known are auto, full, loop, pool"):
        load(str(directory), num_labels=2, driver="fast")
    with pytest.raises(InputError, match="dtype is 'float8'"):
        load(str(directory), num_labels=2, dtype="float8")
    with pytest.raises(InputError, match="num_labels is 0; it must be a whole number from 1"):
        load(str(directory), num_labels=0)
    with pytest.raises(InputError, match="batch_size must be at least 1"):
        load(str(directory), num_labels=2).predict(["a"], batch_size=0)
    with pytest.raises(InputError, match="batch_size must be a whole number, not '8'"):
        load(str(directory), num_labels=2).predict(["a"], batch_size="8")
    with pytest.raises(InputError, match="chunk_tokens must be at least 1, not 0"):
        load(str(directory), num_labels=2, chunk_tokens=0)


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


def test_warmup_shows_its_progress_on_a_terminal(classifier, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    written = []
    monkeypatch.setattr(sys.stderr, "write", written.append)
    classifier.warmup(batch_size=1)
    assert re.search(r"compiling: 100%.*4/4", "".join(written))


ODD_ARGUMENTS = {
    "mesh": [3, "x"],
    "num_labels": ["2", 2.0, 0, -1, True, 10**12],
    "seed": ["x", 1.5, None],
    "chunk_tokens": ["x", 0, 1.5],
    "compilation_cache": [3, "", b"x"],
    "revision": [3, ""],
    "dtype": [None, "int8", np.float32, 3],
    "driver": [None, 3],
    "criterion": [Patience, 3, "patience"],
}


@pytest.mark.parametrize("name", ODD_ARGUMENTS)
def test_an_odd_argument_is_refused_by_its_name(name, directory):
    for value in ODD_ARGUMENTS[name]:
        words = "path" if name == "compilation_cache" else name
        with pytest.raises(InputError, match=words):
            EarlyExitClassifier.from_pretrained(directory, **{"num_labels": 2, name: value})


@pytest.mark.parametrize(
    "path", [None, 3, b"x", "", ["a"], Path, Path("absent"), Path("/no/where")]
)
def test_what_is_no_checkpoint_is_an_input_error(path):
    with pytest.raises(InputError, match="path|there is no directory"):
        EarlyExitClassifier.from_pretrained(path, num_labels=2)


def test_odd_arguments_of_methods_are_input_errors(classifier, directory):
    for lengths in (["x"], [1.5], "8", 5, [0]):
        with pytest.raises(InputError, match="lengths"):
            classifier.warmup(1, lengths=lengths)
    for target in (None, 3, directory / "config.json"):
        with pytest.raises(InputError, match="path|is a file"):
            classifier.save_pretrained(target)


def test_in_bfloat16_the_device_has_no_float32_copy_of_the_encoder(directory, tmp_path):
    classifier = EarlyExitClassifier.from_pretrained(directory, num_labels=2, dtype="bfloat16")
    _, kept = split(classifier.pretrained.model)
    assert {type(value) for value in kept.values()} == {np.ndarray}
    _, on_device = split(classifier.model)
    types = {name.split(".")[0]: str(value.dtype) for name, value in on_device.items()}
    assert types["groups"] == types["embeddings"] == "bfloat16"
    assert types["pooler"] == types["classifiers"] == "float32"
    classifier.save_pretrained(tmp_path)
    copy = EarlyExitClassifier.from_pretrained(tmp_path)
    expected = EarlyExitClassifier.from_pretrained(directory, num_labels=2)
    for name, value in split(expected.model)[1].items():
        np.testing.assert_array_equal(split(copy.model)[1][name], value)
