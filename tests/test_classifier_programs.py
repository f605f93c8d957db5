"""`EarlyExitClassifier`: the programs that it compiles, when it runs them, and their memory."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from classifiers import with_driver
from helpers import random_batch, tiny_model
from pabee_jax import EarlyExitClassifier, InputError, Patience
from pabee_jax.checkpoints.pretrained import Pretrained
from pabee_jax.criteria import as_arrays
from pabee_jax.distributed import sharding
from pabee_jax.drivers import replay as replay_module
from pabee_jax.drivers.ragged import RaggedBatch
from pabee_jax.drivers.shapes import sequence_lengths
from pabee_jax.inference import classifier as classifier_module
from pabee_jax.inference import dispatch, planning
from pabee_jax.inference.dispatch import padded_job
from pabee_jax.inference.programs import run_full, run_full_pool, run_loop, run_pool
from pabee_jax.inference.row_source import row_source
from pabee_jax.models.parameters import split

ROOT = Path(__file__).parents[1]


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


@pytest.mark.parametrize("longest", [1, 32, 128, 129, 300, 512])
def test_few_rows_have_small_chunks_of_few_sizes(longest):
    """A size costs seconds of compiling; a chunk costs its tokens whether or not rows fill it."""
    config, mesh = tiny_model().config, sharding.make_mesh(1)
    small, large = (plan.sizes for plan in planning.pool_plans(config, mesh, longest))
    assert len(small.tokens) == 3 and len(large.tokens) == 2
    assert small.tokens[-1] <= 64 and small.block_tokens <= max(128, longest)
    given = planning.pool_plans(config, mesh, longest, chunk_tokens=40)
    assert {plan.sizes.tokens for plan in given} == {(40, 10)}


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


def test_warmup_shows_its_progress_on_a_terminal(classifier, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    written = []
    monkeypatch.setattr(sys.stderr, "write", written.append)
    classifier.warmup(batch_size=1)
    assert re.search(r"compiling: 100%.*4/4", "".join(written))


def test_in_bfloat16_the_device_has_no_float32_copy_of_a_matrix_of_the_encoder(directory, tmp_path):
    classifier = EarlyExitClassifier.from_pretrained(directory, num_labels=2, dtype="bfloat16")
    _, kept = split(classifier.pretrained.model)
    assert {type(value) for value in kept.values()} == {np.ndarray}
    _, on_device = split(classifier.model)
    kernels = {name: value for name, value in on_device.items() if name.endswith("kernel")}
    types = {name.split(".")[0]: str(value.dtype) for name, value in kernels.items()}
    assert types == {"groups": "bfloat16", "pooler": "float32", "classifiers": "float32"}
    classifier.save_pretrained(tmp_path)
    copy = EarlyExitClassifier.from_pretrained(tmp_path)
    expected = EarlyExitClassifier.from_pretrained(directory, num_labels=2)
    for name, value in split(expected.model)[1].items():
        np.testing.assert_array_equal(split(copy.model)[1][name], value)
