"""Every driver gives each row the exit that it would have alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_batch, tiny_model

from pabee_jax import Patience, early_exit, parallel, replay
from pabee_jax.criteria import as_arrays
from pabee_jax.drivers.full import all_exit_logits

# Matrix products of different batch sizes round differently by about 2e-6; rows whose decision
# hangs on less than this may move.
MARGIN = 1e-5
MODELS = {
    "bert": dict(family="bert"),
    "albert": dict(family="albert"),
    "albert with groups": dict(
        family="albert", num_hidden_groups=2, inner_group_num=2, num_hidden_layers=5
    ),
}


@functools.cache
def model_of(name: str, labels: int):
    return tiny_model(**MODELS[name], labels=labels)


full = jax.jit(all_exit_logits)
loop = jax.jit(early_exit)


def decided(logits: np.ndarray, threshold: float) -> np.ndarray:
    """Rows whose every decision stands clear of rounding."""
    logits = np.asarray(logits)
    if logits.shape[2] == 1:
        distance = np.abs(np.abs(np.diff(logits[..., 0], axis=0)) - threshold)
    else:
        ordered = np.sort(logits, axis=2)
        distance = ordered[..., -1] - ordered[..., -2]
    return distance.min(axis=0) > MARGIN


def criterion_of(patience: int, labels: int) -> Patience:
    return Patience(patience, 0.1 if labels == 1 else 0.0)


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("devices", [1, 8])
def test_loop_equals_full_and_replay_at_every_batch_size(name, labels, devices):
    model = model_of(name, labels)
    mesh = parallel.make_mesh(devices)
    on_mesh = parallel.replicate(model, mesh)
    batch = random_batch(32, seed=labels)
    logits = full(model, batch)
    clear = decided(logits, 0.1)
    assert clear.mean() > 0.9, "this test needs rows that are decided"
    for size in (1, 2, 7, 32):
        rows = slice(0, size)
        padded = -size % devices
        part = {key: np.pad(value[rows], ((0, padded), (0, 0))) for key, value in batch.items()}
        part = parallel.shard_batch(part, mesh)
        for patience in (0, 1, 2, 4, 9):
            criterion = criterion_of(patience, labels)
            exits, answers = replay(criterion, logits[:, rows])
            found_exits, found = loop(on_mesh, part, as_arrays(criterion))
            keep = clear[rows]
            np.testing.assert_array_equal(found_exits[:size][keep], exits[keep])
            np.testing.assert_allclose(found[:size][keep], answers[keep], atol=2e-5)
            assert (np.asarray(found_exits[size:]) == 0).all(), "a padding row took part"


def test_rows_leave_at_different_layers():
    """Otherwise the test above would show little."""
    exits, _ = replay(Patience(1), full(model_of("albert", 3), random_batch(32, seed=3)))
    assert len(set(exits.tolist())) >= 3


@pytest.mark.parametrize("name", MODELS)
def test_one_trace_for_every_patience(name):
    traces = []

    def counted(model, batch, criterion):
        traces.append(1)
        return early_exit(model, batch, criterion)

    program = jax.jit(counted)
    for patience in (0, 1, np.int64(2), 3, 50):
        program(model_of(name, 3), random_batch(4), as_arrays(Patience(patience)))
    assert len(traces) == 1, f"{len(traces)} traces for five values of patience"


def test_the_loop_stops_when_every_row_has_left():
    """Counted by the layers at which the criterion is really asked."""
    calls = []
    model = tiny_model("albert", labels=2)
    model.classifiers.bias.set_value(jnp.tile(jnp.float32([0, 1e6]), (6, 1)))

    def count(layer):
        calls.append(int(layer))

    class Observed:
        def __init__(self, inner):
            self.inner = inner

        def init(self, logits, row):
            return self.inner.init(logits, row)

        def update(self, state, logits, layer):
            jax.debug.callback(count, layer, ordered=True)
            return self.inner.update(state, logits, layer)

        def warnings(self, num_layers, is_regression):
            return []

    exits, _ = early_exit(model, random_batch(5), Observed(Patience(2)))
    jax.effects_barrier()
    assert exits.tolist() == [3] * 5
    assert calls == [1, 2, 3]


def test_padding_rows_keep_nobody_waiting():
    model = model_of("albert", 3)
    batch = random_batch(4)
    empty = {key: np.concatenate([value, 0 * value]) for key, value in batch.items()}
    exits, logits = loop(model, batch, as_arrays(Patience(1)))
    more_exits, more_logits = loop(model, empty, as_arrays(Patience(1)))
    np.testing.assert_array_equal(more_exits, [*exits, 0, 0, 0, 0])
    np.testing.assert_allclose(more_logits[:4], logits, atol=2e-5)
