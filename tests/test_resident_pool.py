"""A resident pool gives every row the exit that it has alone, whenever the row is admitted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import tiny_model
from pabee_jax import Entropy, Patience, replay
from pabee_jax.criteria import CRITERIA, Vote, Window, as_arrays
from pabee_jax.data.dataset import Dataset
from pabee_jax.data.packing import packed
from pabee_jax.drivers import resident_pool
from pabee_jax.drivers.full import all_exit_logits
from pabee_jax.drivers.shapes import ChunkSizes

SLOW = pytest.mark.slow
SIZES = dict(sizes=ChunkSizes.of(32, 16))
MAX_ROWS, MAX_TOKENS, NEW_ROWS, NEW_TOKENS = 12, 96, 4, 64


def random_rows(num_rows, vocabulary=40, seed=0):
    """Return rows of 3 to 16 tokens."""
    random = np.random.default_rng(seed)
    lengths = random.integers(3, 17, num_rows)
    mask = np.arange(16) < lengths[:, None]
    ids = np.where(mask, random.integers(1, vocabulary, mask.shape), 0)
    return Dataset(ids.astype(np.int32), mask.astype(np.int8), np.zeros(mask.shape, np.int8))


def stacked_criteria(settings):
    """Return the settings as one criterion whose leaves have the row axis first."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *map(as_arrays, settings))


class Pool:
    """The host's side of a resident pool."""

    def __init__(self, model, setting):
        self.admit = jax.jit(functools.partial(resident_pool.admit, model, **SIZES))
        self.advance = jax.jit(functools.partial(resident_pool.advance, model, **SIZES))
        sizes = dict(max_rows=MAX_ROWS, max_tokens=MAX_TOKENS)
        self.rows = resident_pool.empty(model, as_arrays(setting), **sizes, **SIZES)
        self.exits = {}

    @property
    def active(self):
        return int((~np.asarray(self.rows.exits.done)).sum())

    @property
    def free_tokens(self):
        active = ~np.asarray(self.rows.exits.done)
        return MAX_TOKENS - int(np.asarray(self.rows.lengths)[active].sum())

    def take(self, dataset, tickets, settings):
        batch, places = packed(dataset.take(tickets), 1, NEW_ROWS, NEW_TOKENS, 16)
        of_place = np.full(NEW_ROWS, -1, np.int32)
        of_place[places] = tickets
        chosen = [settings[max(ticket, 0)] for ticket in of_place]
        self.rows = self.admit(self.rows, batch, of_place, stacked_criteria(chosen))

    def run(self, num_layers):
        self.rows = self.advance(self.rows, num_layers)
        exits = self.rows.exits
        ticket, done, layer, answers = map(
            np.asarray,
            (self.rows.ticket, exits.done, exits.exit_layer, exits.logits),
        )
        for index in np.flatnonzero(done & (ticket >= 0)):
            self.exits.setdefault(int(ticket[index]), (int(layer[index]), answers[index]))


def served(model, dataset, settings, looks, mixed):
    """Return the exits of all rows, which arrive a few at a time, between looks at the pool."""
    pool, waiting = Pool(model, settings[0]), list(range(len(dataset)))
    for look in looks:
        if mixed or not pool.active:
            new = []
            tokens = min(NEW_TOKENS, pool.free_tokens)
            while waiting and len(new) < min(NEW_ROWS, MAX_ROWS - pool.active):
                tokens -= int(dataset.lengths[waiting[0]])
                if tokens < 0:
                    break
                new.append(waiting.pop(0))
            if new:
                pool.take(dataset, np.array(new), settings)
        if not waiting and not pool.active:
            break
        pool.run(look)
    assert len(pool.exits) == len(dataset), "the test needs more looks"
    layers, answers = zip(*(pool.exits[row] for row in range(len(dataset))), strict=True)
    return np.array(layers), np.array(answers)


CASES = {
    "albert, cls": ("albert", {}, True),
    "albert, mean and own poolers": (
        "albert",
        {"exit_pooling": "mean", "exit_pooler": "per_exit"},
        True,
    ),
    "bert, cls": ("bert", {}, False),
    "mpnet, mean": ("mpnet", {"exit_pooling": "mean"}, False),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "bert, cls" else SLOW) for name in CASES]
)
def test_a_row_exits_as_it_does_alone(name):
    """Rows have different lengths and different patience, and arrive at different times."""
    family, exits, mixed = CASES[name]
    model = tiny_model(family, labels=3, num_hidden_layers=5, **exits)
    dataset = random_rows(20, model.config.vocab_size)
    settings = [Patience(1 + row % 4) for row in range(len(dataset))]
    assert resident_pool.shares_all_layers(model) == mixed
    layers, answers = served(model, dataset, settings, [1, 2, 1, 3, 1, 2] * 12, mixed)
    batch = {name: jnp.asarray(dataset[name]) for name in ("input_ids", "attention_mask")}
    logits = np.asarray(jax.jit(all_exit_logits)(model, batch))
    assert len(set(layers.tolist())) > 2, "the rows exit at few layers; change the test"
    for row, setting in enumerate(settings):
        expected_layer, expected = replay(setting, logits[:, row : row + 1])
        assert layers[row] == expected_layer[0], f"row {row}, {setting}"
        np.testing.assert_allclose(answers[row], expected[0], atol=2e-5)


@SLOW
@pytest.mark.parametrize("kind", [Window, Entropy, Vote])
def test_other_criteria_have_a_setting_per_row_too(kind):
    model = tiny_model("albert", labels=3, num_hidden_layers=5)
    dataset = random_rows(9, model.config.vocab_size, seed=1)
    batch = {name: jnp.asarray(dataset[name]) for name in ("input_ids", "attention_mask")}
    logits = np.asarray(jax.jit(all_exit_logits)(model, batch))
    families = CRITERIA[kind.__name__.lower()].families(logits, 9)
    every = [setting for family in families.values() for setting in family]
    settings = [every[row % len(every)] for row in range(len(dataset))]
    layers, answers = served(model, dataset, settings, [1] * 40, True)
    for row, setting in enumerate(settings):
        expected_layer, expected = replay(setting, logits[:, row : row + 1])
        assert layers[row] == expected_layer[0], f"row {row}, {setting}"
        np.testing.assert_allclose(answers[row], expected[0], atol=2e-5)
