"""Every driver gives a row the exit that the row has when it runs alone."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from benchmarks.exit_schedule import ExitSchedule
from helpers import random_batch, run_on, tiny_model
from pabee_jax import EarlyExitClassifier, Patience, early_exit, replay
from pabee_jax.checkpoints.pretrained import Pretrained
from pabee_jax.criteria import Criterion, as_arrays
from pabee_jax.distributed import sharding
from pabee_jax.drivers.full import all_exit_logits
from pabee_jax.drivers.layer_loop import Control
from pabee_jax.drivers.shapes import ChunkSizes
from pabee_jax.inference.programs import run_loop, run_pool
from pabee_jax.models.transformer import TransformerLayer

# The rounding of matrix products differs by about 2e-6 between batch sizes. A row whose decision
# depends on a smaller difference than this margin may exit at another layer.
MARGIN = 1e-5
MODELS = {
    "bert": dict(family="bert"),
    "albert": dict(family="albert"),
    "albert with groups": dict(
        family="albert", num_hidden_groups=2, inner_group_num=2, num_hidden_layers=5
    ),
}
# For tests that say the same of every model: the model of most code paths, and slowly all others.
ONE_BY_DEFAULT = [
    pytest.param(name, marks=() if name == "bert" else pytest.mark.slow) for name in MODELS
]


@functools.cache
def model_of(name: str, labels: int):
    return tiny_model(**MODELS[name], labels=labels)


full = jax.jit(all_exit_logits)
loop = jax.jit(early_exit)


def decided(logits: np.ndarray, threshold: float) -> np.ndarray:
    """Return which rows have no decision that rounding can change."""
    logits = np.asarray(logits)
    if logits.shape[2] == 1:
        distance = np.abs(np.abs(np.diff(logits[..., 0], axis=0)) - threshold)
    else:
        ordered = np.sort(logits, axis=2)
        distance = ordered[..., -1] - ordered[..., -2]
    return distance.min(axis=0) > MARGIN


def assert_every_driver_agrees(model, batch, criteria, mesh, chunk_rows_values, threshold=0.1):
    logits = full(model, batch)
    is_decided = decided(logits, threshold)
    for criterion in criteria:
        expected_layers, expected_logits = replay(criterion, logits)
        for chunk_rows in (None, *chunk_rows_values):
            exit_layers, exit_logits = run_on(mesh, model, batch, criterion, chunk_rows=chunk_rows)
            case = f"{criterion}, chunk_rows {chunk_rows} (None: loop)"
            np.testing.assert_array_equal(
                exit_layers[is_decided], expected_layers[is_decided], case
            )
            np.testing.assert_allclose(
                exit_logits[is_decided], expected_logits[is_decided], atol=2e-5, err_msg=case
            )
    return is_decided


@pytest.mark.parametrize(
    ("name", "labels", "devices", "rows"),
    [
        ("bert", 3, 8, 32),
        ("albert", 1, 1, 7),
        ("albert with groups", 3, 1, 7),
        pytest.param("bert", 3, 1, 7, marks=pytest.mark.slow),
        pytest.param("albert", 1, 8, 32, marks=pytest.mark.slow),
        pytest.param("albert with groups", 3, 8, 32, marks=pytest.mark.slow),
    ],
)
def test_loop_and_pool_equal_full_and_replay(name, labels, devices, rows):
    is_decided = assert_every_driver_agrees(
        model_of(name, labels),
        random_batch(rows, seed=labels),
        [Patience(patience, 0.1) for patience in (0, 1, 2, 4, 9)],
        sharding.make_mesh(devices),
        chunk_rows_values=[3],
    )
    assert is_decided.mean() > 0.9, "too few rows are decided: choose another seed or threshold"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pooling", "devices"),
    [
        ("bert", "cls", 8),
        pytest.param("albert with groups", "mean", 1, marks=pytest.mark.slow),
    ],
)
def test_full_without_padding_equals_full_with_padding(name, pooling, devices):
    """For more rows than `full` pads, of 2 to 12 tokens."""
    model = tiny_model(**MODELS[name], exit_pooling=pooling)
    pretrained = Pretrained(model, None, {}, ("0", "1", "2"), 12)
    mesh = sharding.make_mesh(devices)
    classifier = EarlyExitClassifier(pretrained, driver="full", mesh=mesh, chunk_tokens=30)
    batch = random_batch(37, length=12)
    np.testing.assert_allclose(classifier.all_exit_logits(batch), full(model, batch), atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_every_driver_agrees_for_random_models_and_batches(seed):
    """Random models, lengths, rows, criteria and chunk sizes, on one device and on eight."""
    random = np.random.default_rng(seed)
    layers, labels = int(random.integers(1, 7)), int(random.integers(1, 5))
    shape = dict(family=["bert", "albert"][seed % 2], num_hidden_layers=layers)
    if shape["family"] == "albert":
        shape |= dict(num_hidden_groups=int(random.choice([1, layers])))
    model = tiny_model(**shape, labels=labels, seed=seed)
    rows = int([1, 300, 255][seed] if seed < 3 else random.integers(1, 300))
    batch = random_batch(rows, length=int(random.integers(3, 20)), seed=seed)
    threshold = float(random.uniform(0.02, 0.5))
    patience = random.integers(0, layers + 2, 2)
    is_decided = assert_every_driver_agrees(
        model,
        batch,
        [
            *(Patience(int(value), threshold) for value in patience),
            ExitSchedule(random.integers(1, layers + 3, rows).astype(np.int32)),
        ],
        sharding.make_mesh([1, 8][seed // 2 % 2]),
        chunk_rows_values=[int(random.integers(1, 60))],
        threshold=threshold,
    )
    assert is_decided.mean() > 0.9, "too few rows are decided: choose another seed or threshold"


@pytest.mark.parametrize("chunk_rows", [None, 4])
@pytest.mark.parametrize(("name", "devices"), [("albert", 1), ("bert", 8)])
@pytest.mark.parametrize("layer", [1, 6])
def test_all_rows_may_exit_at_the_first_layer_or_at_the_last(layer, name, devices, chunk_rows):
    model, batch = model_of(name, 3), random_batch(13)
    schedule = ExitSchedule(np.full(13, 1 if layer == 1 else 99, np.int32))
    mesh = sharding.make_mesh(devices)
    exit_layers, logits = run_on(mesh, model, batch, schedule, chunk_rows=chunk_rows)
    assert exit_layers.tolist() == [layer] * 13
    np.testing.assert_allclose(logits, full(model, batch)[layer - 1], atol=2e-5)


@pytest.mark.parametrize(
    ("control", "chunk_rows"),
    [
        (Control("cond"), None),
        (Control(untested_layers=2), None),
        pytest.param(Control(untested_layers=2), 4, marks=pytest.mark.slow),
        pytest.param(Control("cond"), 4, marks=pytest.mark.slow),
    ],
)
def test_control_does_not_change_the_results(control, chunk_rows):
    model, batch, mesh = model_of("albert with groups", 3), random_batch(21), sharding.make_mesh(8)
    expected_layers, expected_logits = run_on(
        mesh, model, batch, Patience(1), chunk_rows=chunk_rows
    )
    exit_layers, logits = run_on(
        mesh, model, batch, Patience(1), chunk_rows=chunk_rows, control=control
    )
    np.testing.assert_array_equal(exit_layers, expected_layers)
    np.testing.assert_allclose(logits, expected_logits, atol=2e-5)


@pytest.mark.parametrize("chunk_rows", [pytest.param(1, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize("name", MODELS)
def test_the_pool_computes_only_active_rows(monkeypatch, name, chunk_rows):
    """A row that exits at layer e starts e layers and finishes e - 1 of them.

    The test counts the tokens in the methods of a transformer layer. The tokens that do not fill a
    chunk run in chunks of a quarter.
    """
    tokens = {"keys_values": [], "finish": []}

    def count(method):
        original = getattr(TransformerLayer, method)

        def counted(self, hidden, *operands):
            jax.debug.callback(lambda: tokens[method].append(len(hidden)))
            return original(self, hidden, *operands)

        monkeypatch.setattr(TransformerLayer, method, counted)

    count("keys_values")
    count("finish")
    model, rows, batch = model_of(name, 3), 50, random_batch(50)
    layers, inner = model.config.num_hidden_layers, model.config.inner_group_num
    exit_layers = np.random.default_rng(0).integers(1, layers + 1, rows).astype(np.int32)
    run_on(sharding.make_mesh(1), model, batch, ExitSchedule(exit_layers), chunk_rows)
    jax.effects_barrier()
    lengths = batch["attention_mask"].sum(axis=1)
    chunk = chunk_rows * lengths.max()
    exits = ChunkSizes.of(int(chunk), int(lengths.max())).exit_rows
    windows = [
        tokens_of_chunks(lengths[exit_layers >= layer].sum(), chunk)
        for layer in range(1, layers + 1)
    ]
    # With several transformer layers per layer, all but the last run as a whole when it starts.
    expected = {
        "keys_values": inner * sum(windows),
        "finish": (inner - 1) * sum(windows) + sum(windows[1:]),
    }
    for method, counts in tokens.items():
        # The calls for `exits` rows finish first tokens.
        assert sum(count for count in counts if count not in exits) == expected[method], method
    assert (exit_layers * lengths).sum() <= sum(windows) < (layers * lengths).sum()


def tokens_of_chunks(tokens: int, chunk: int) -> int:
    """Return the tokens of the chunks that hold these tokens."""
    quarter = chunk // 4
    full = 0
    while tokens - full * chunk > chunk - quarter:
        full += 1
    return full * chunk + max(0, -(-(tokens - full * chunk) // quarter)) * quarter


COLLECTIVES = re.compile(r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter")


@pytest.mark.parametrize("chunk_rows", [None, 4])
@pytest.mark.parametrize("name", ONE_BY_DEFAULT)
def test_the_programs_contain_no_collectives(monkeypatch, name, chunk_rows):
    """A collective in the loop would make every device wait for the others at every layer."""
    programs = []

    def recorded(program):
        def run(*arguments, **options):
            programs.append(program.lower(*arguments, **options))
            return program(*arguments, **options)

        return run

    monkeypatch.setattr(helpers, "run_loop", recorded(run_loop))
    monkeypatch.setattr(helpers, "run_pool", recorded(run_pool))
    run_on(sharding.make_mesh(8), model_of(name, 3), random_batch(32), Patience(1), chunk_rows)
    text = programs[0].compile().as_text()
    assert "while(" in text and not COLLECTIVES.findall(text)


def test_the_collectives_pattern_matches_when_there_are_collectives():
    """Without `shard_map`, the test "has every row exited?" needs a reduction over all devices."""
    batch = sharding.shard_batch(random_batch(32), sharding.make_mesh(8))
    model = sharding.replicate(model_of("bert", 3), sharding.make_mesh(8))
    text = loop.lower(model, batch, as_arrays(Patience(1))).compile().as_text()
    assert COLLECTIVES.findall(text)


def test_rows_of_the_test_model_exit_at_different_layers():
    """Otherwise the tests above, in which drivers agree, would show little."""
    exit_layers, _ = replay(Patience(1), full(model_of("albert", 3), random_batch(32, seed=3)))
    assert len(set(exit_layers.tolist())) >= 3


@pytest.mark.parametrize("name", ONE_BY_DEFAULT)
def test_a_new_patience_does_not_retrace(name):
    traces = []

    def counted(model, batch, criterion):
        traces.append(1)
        return early_exit(model, batch, criterion)

    program = jax.jit(counted)
    for patience in (0, 1, np.int64(2), 3, 50):
        program(model_of(name, 3), random_batch(4), as_arrays(Patience(patience)))
    assert len(traces) == 1, f"{len(traces)} traces for five values of patience, instead of one"
    before = run_pool._cache_size()
    for patience in (0, 1, np.int64(2), 3, 50):
        run_on(sharding.make_mesh(1), model_of(name, 3), random_batch(4), Patience(patience), 3)
    assert run_pool._cache_size() == before + 1


def test_the_loop_stops_when_every_row_has_exited():
    """The test records the layers at which the criterion is evaluated."""
    calls = []
    model = tiny_model("albert", labels=2)
    model.classifiers.bias.set_value(jnp.tile(jnp.float32([0, 1e6]), (6, 1)))

    def count(layer):
        calls.append(int(layer))

    class Observed(Criterion):
        def __init__(self, inner):
            self.inner = inner

        def init(self, logits, row):
            return self.inner.init(logits, row)

        def update(self, state, logits, layer):
            jax.debug.callback(count, layer, ordered=True)
            return self.inner.update(state, logits, layer)

    exit_layers, _ = early_exit(model, random_batch(5), Observed(Patience(2)))
    jax.effects_barrier()
    assert exit_layers.tolist() == [3] * 5
    assert calls == [1, 2, 3]


def test_padding_rows_exit_before_the_first_layer():
    """In the pool, `run_on` tests this for every batch."""
    model = model_of("albert", 3)
    batch = random_batch(4)
    padded_batch = {name: np.concatenate([array, 0 * array]) for name, array in batch.items()}
    exit_layers, logits = early_exit(model, batch, as_arrays(Patience(1)))
    padded_layers, padded_logits = early_exit(model, padded_batch, as_arrays(Patience(1)))
    np.testing.assert_array_equal(padded_layers, [*exit_layers, 0, 0, 0, 0])
    np.testing.assert_allclose(padded_logits[:4], logits, atol=2e-5)
