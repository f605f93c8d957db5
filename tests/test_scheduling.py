"""A simulation of the engine's scheduler, for encoders whose layers do not share their parameters.

All rows of a group are at one depth. The engine runs one group until its last row has exited, and
then admits the rows that wait. The simulation compares this policy with others on recorded exit
layers (MPNet-base on SST-2's dev set) and measured times of layers: a fixed time, and a time per
token.
"""

from pathlib import Path

import numpy as np
import pytest

from pabee_jax import MaxProbability, replay

safetensors = pytest.importorskip("safetensors.numpy")

RECORDED = "docs/data/evidence/logits/fast_exits+uniform+distill-sst2-0.safetensors"
# Seconds per layer, per token of a layer, and per look: about those of the engine on the shape of
# ALBERT-base, whose layers have the size of MPNet-base's, in float32 on two CPU cores.
LAYER, TOKEN, LOOK = 3e-3, 130e-6, 5e-4
MAX_TOKENS, ROWS, LOAD = 1024, 2500, 0.7


@pytest.fixture(scope="module")
def rows():
    """Return the exit layers and the numbers of tokens of many rows."""
    path = Path(__file__).parents[1] / RECORDED
    logits = safetensors.load_file(path)["logits"]
    exits, _ = replay(MaxProbability(0.95), logits)  # A mean exit layer of 3.6 of 12.
    random = np.random.default_rng(0)
    tokens = np.clip(random.lognormal(np.log(24), 0.5, ROWS), 4, 128).astype(int)
    return random.choice(exits, ROWS), tokens


def simulate(policy, arrivals, exits, tokens, looks=True):
    """Return the seconds from the arrival to the answer of each row.

    Args:
        policy: (waiting rows, groups) -> the group to run for one layer, or None to admit the rows
            that wait as a new group. A group is a list [depth, active rows, all rows].
        looks: whether a row is answered when it exits, or with the last row of its group.
    """
    now, next_arrival, waiting, groups = 0.0, 0, [], []
    answered = np.full(len(arrivals), np.nan)
    while next_arrival < len(arrivals) or waiting or groups:
        while next_arrival < len(arrivals) and arrivals[next_arrival] <= now:
            waiting.append(next_arrival)
            next_arrival += 1
        if not waiting and not groups:
            now = arrivals[next_arrival]
            continue
        group = policy(waiting, groups)
        if group is None:
            fit = max(1, int((np.cumsum(tokens[waiting]) <= MAX_TOKENS).sum()))
            group, waiting = [0, waiting[:fit]], waiting[fit:]
            group.append(list(group[1]))
            groups.append(group)
        depth, active, all_rows = group
        now += LAYER + TOKEN * tokens[active].sum() + LOOK * looks
        group[0] = depth + 1
        group[1] = [row for row in active if exits[row] > depth + 1]
        left = [row for row in active if exits[row] <= depth + 1]
        answered[left if looks else all_rows] = now
        if not group[1]:
            groups.remove(group)
        else:
            merge(groups, group, tokens)
    return answered - arrivals


def merge(groups, group, tokens):
    """Merge a group with another at its depth, if both fit."""
    for other in groups:
        if other is not group and other[0] == group[0]:
            if tokens[other[1] + group[1]].sum() <= MAX_TOKENS:
                other[1] += group[1]
                other[2] += group[2]
                groups.remove(group)
            return


def one_after_the_other(waiting, groups):
    return groups[0] if groups else None


def youngest_first(waiting, groups):
    return None if waiting else min(groups)


def when_more_wait_than_run(tokens):
    """Admit a second group when more tokens wait than are active; the deepest group runs first."""

    def policy(waiting, groups):
        active = sum(tokens[group[1]].sum() for group in groups)
        if not groups or (waiting and tokens[waiting].sum() >= active):
            return None
        return max(groups)

    return policy


@pytest.fixture(scope="module")
def arrivals(rows):
    exits, tokens = rows
    at_once = simulate(one_after_the_other, np.zeros(ROWS), exits, tokens, looks=False)
    capacity = ROWS / at_once.max()
    return np.cumsum(np.random.default_rng(1).exponential(1 / (LOAD * capacity), ROWS))


def quantiles(seconds):
    return np.median(seconds), np.quantile(seconds, 0.99)


def test_answers_at_the_exit_are_earlier_than_answers_at_the_end_of_a_pool(rows, arrivals):
    engine = quantiles(simulate(one_after_the_other, arrivals, *rows))
    pools = quantiles(simulate(one_after_the_other, arrivals, *rows, looks=False))
    assert engine[0] < 0.85 * pools[0] and engine[1] < 1.1 * pools[1]


def test_no_policy_with_several_groups_is_better_in_the_median_and_in_the_tail(rows, arrivals):
    engine = quantiles(simulate(one_after_the_other, arrivals, *rows))
    for policy in (youngest_first, when_more_wait_than_run(rows[1])):
        other = quantiles(simulate(policy, arrivals, *rows))
        assert other[0] > 0.95 * engine[0] or other[1] > 1.05 * engine[1]


def test_every_row_is_answered_after_its_layers(rows, arrivals):
    exits, tokens = rows
    for policy in (one_after_the_other, youngest_first, when_more_wait_than_run(tokens)):
        seconds = simulate(policy, arrivals, exits, tokens)
        assert np.all(seconds >= exits * (LAYER + LOOK + TOKEN * tokens) - 1e-9)
