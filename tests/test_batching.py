"""Batches have static shapes, are a pure function of (seed, step), and hold every row once."""

import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pabee_jax.data.batching import (
    assemble,
    batches_by_bucket,
    inference_buckets,
    sequence_buckets,
    steps_per_epoch,
    training_batch,
    training_rows,
)
from pabee_jax.data.dataset import Dataset
from pabee_jax.data.packing import blocks_that_fit, packed
from pabee_jax.drivers.shapes import sequence_lengths

BUCKETS = sequence_buckets(32)


def dataset_of(lengths):
    """Return a dataset whose row r has `lengths[r]` tokens with id r + 1, and label r."""
    lengths = np.asarray(lengths)
    rows = np.arange(len(lengths), dtype=np.int32)
    mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int8)
    return Dataset((rows[:, None] + 1) * mask, mask, mask // 2, rows)


def random_dataset(rows=21):
    return dataset_of(np.random.default_rng(0).integers(2, 33, rows))


def digest(dataset, steps, batch_size=8, seed=5):
    """Return a hash of the names, shapes, types and values of several batches."""
    total = hashlib.sha256()
    for step in steps:
        batch = training_batch(dataset, batch_size, BUCKETS, seed, step)
        for name in sorted(batch):
            total.update(f"{name}{batch[name].shape}{batch[name].dtype}".encode())
            total.update(batch[name].tobytes())
    return total.hexdigest()


def test_a_batch_is_a_function_of_seed_and_step():
    dataset, steps = random_dataset(), range(9)
    in_order = [digest(dataset, [step]) for step in steps]
    out_of_order = {step: digest(dataset, [step]) for step in (7, 0, 8, 3, 1, 6, 2, 5, 4)}
    assert in_order == [out_of_order[step] for step in steps]
    assert len(set(in_order)) == len(in_order), "different steps must have different batches"
    assert digest(dataset, steps) != digest(dataset, steps, seed=6)


def test_batches_are_the_same_in_another_process():
    code = "import test_batching as t; print(t.digest(t.random_dataset(), range(9)))"
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "77"}
    output = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert output.split()[-1] == digest(random_dataset(), range(9))


@pytest.mark.parametrize("rows, batch_size", [(21, 8), (16, 8), (1, 1), (1, 8), (5, 64)])
def test_every_epoch_has_every_row_once(rows, batch_size):
    steps = steps_per_epoch(rows, batch_size)
    epochs = [
        np.concatenate(
            [training_rows(rows, batch_size, 0, epoch * steps + step) for step in range(steps)]
        )
        for epoch in range(3)
    ]
    for epoch in epochs:
        assert sorted(epoch) == list(range(rows))
    if rows > 1:
        assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any()


@pytest.mark.parametrize("rows, batch_size", [(21, 8), (700, 8), (1, 1), (1, 8), (5, 64)])
def test_an_epoch_grouped_by_length_has_every_row_once(rows, batch_size):
    lengths = np.random.default_rng(0).integers(3, 60, rows)
    steps = steps_per_epoch(rows, batch_size)
    for epoch in range(2):
        batches = [
            training_rows(rows, batch_size, 0, epoch * steps + step, lengths)
            for step in range(steps)
        ]
        assert sorted(np.concatenate(batches)) == list(range(rows))
        assert sorted(map(len, batches)) == sorted(
            len(range(start, min(start + batch_size, rows))) for start in range(0, rows, batch_size)
        )


def test_the_last_batch_of_an_epoch_may_hold_rows_of_any_length():
    lengths = np.arange(3, 3 + 97)
    steps = steps_per_epoch(97, 32)
    last_steps = [epoch * steps + steps - 1 for epoch in range(8)]
    last_rows = [training_rows(97, 32, 0, step, lengths).item() for step in last_steps]
    assert len(set(last_rows)) > 4, (
        "rows of the small last batch count more in the loss: they must differ between epochs"
    )


def test_grouping_by_length_saves_padding_and_keeps_batches_in_random_order():
    lengths = np.random.default_rng(0).integers(3, 60, 4000)

    def longest_of_batches(grouping_lengths):
        batches = [training_rows(4000, 16, 0, step, grouping_lengths) for step in range(250)]
        return np.array([lengths[rows].max() for rows in batches])

    shuffled, grouped = longest_of_batches(None), longest_of_batches(lengths)
    assert shuffled.mean() > 1.6 * lengths.mean()
    assert grouped.mean() < 1.1 * lengths.mean()
    assert abs(np.corrcoef(np.arange(250), grouped)[0, 1]) < 0.2, (
        "the length of a batch must not depend on its position in the epoch"
    )


def test_the_last_batch_of_an_epoch_is_padded_and_masked():
    batch = training_batch(random_dataset(21), 8, BUCKETS, 0, 2)
    assert batch["valid"].tolist() == [True] * 5 + [False] * 3
    for name in ("input_ids", "attention_mask", "token_type_ids", "labels"):
        assert len(batch[name]) == 8 and (batch[name][5:] == 0).all(), name
    assert (batch["attention_mask"][:5, 0] == 1).all()


@pytest.mark.parametrize("rows, batch_size", [(1, 4), (3, 64)])
def test_a_batch_may_be_larger_than_the_dataset(rows, batch_size):
    dataset = dataset_of([6] * rows)
    for step in range(3):
        batch = training_batch(dataset, batch_size, BUCKETS, 0, step)
        assert batch["input_ids"].shape == (batch_size, 8)
        assert batch["valid"].sum() == rows
        assert sorted(batch["labels"][batch["valid"]]) == list(range(rows))


@pytest.mark.parametrize(
    "longest, expected", [(1, 8), (8, 8), (9, 16), (16, 16), (17, 24), (24, 24), (25, 32), (32, 32)]
)
def test_the_bucket_is_the_smallest_that_holds_the_longest_row(longest, expected):
    # 1/8, 1/4, 1/2, 3/4 and all of 32, rounded up to multiples of 8: 4 becomes 8.
    assert BUCKETS == (8, 16, 24, 32)
    batch = training_batch(dataset_of([1, longest]), 2, BUCKETS, 0, 0)
    assert batch["input_ids"].shape == (2, expected)
    assert batch["attention_mask"].sum() == 1 + longest


def test_a_row_outside_the_batch_does_not_widen_it():
    dataset = dataset_of([1, 5, 32])
    widths = set()
    for step in range(20):
        batch = training_batch(dataset, 1, BUCKETS, 0, step)
        assert batch["input_ids"].shape[1] == (32 if batch["labels"][0] == 2 else 8)
        widths.add(batch["input_ids"].shape[1])
    assert widths == {8, 32}


def test_lengths_of_few_rows_are_8_apart_and_then_grow_by_at_most_a_quarter():
    for max_length in (8, 9, 31, 32, 33, 64, 128, 509, 512, 4096):
        lengths = sequence_lengths(max_length)
        assert lengths[-1] == max_length and list(lengths) == sorted(set(lengths))
        for shorter, longer in itertools.pairwise((0, *lengths)):
            assert longer - shorter <= max(8, shorter / 4)
    assert len(sequence_lengths(512)) < 20


@pytest.mark.parametrize("make_buckets", [sequence_buckets, inference_buckets])
def test_there_are_at_most_five_buckets_and_the_last_is_the_limit(make_buckets):
    for max_length in range(8, 513):
        buckets = make_buckets(max_length)
        assert 1 <= len(buckets) <= 5 and buckets[-1] == max_length, buckets
        assert list(buckets) == sorted(set(buckets)), buckets
        assert all(bucket % 8 == 0 for bucket in buckets[:-1]), buckets


def test_the_length_of_a_mask_with_holes_ends_at_its_last_token():
    mask = np.zeros((3, 12), np.int8)
    mask[0, [0, 1, 9]] = 1
    mask[1, [0, 3]] = 1
    mask[2, 11] = 1
    dataset = Dataset(np.ones((3, 12), np.int32), mask, np.zeros_like(mask))
    assert dataset.lengths.tolist() == [10, 4, 12]
    batch = assemble(dataset, np.array([0]), 1, 16)
    assert np.flatnonzero(batch["attention_mask"][0]).tolist() == [0, 1, 9]
    assert "labels" not in batch


@pytest.mark.parametrize(
    "rows, batch_size, block", [(21, 4, 21), (21, 4, 5), (1, 8, 1), (40, 64, 7)]
)
def test_by_bucket_yields_every_row_once_in_its_bucket(rows, batch_size, block):
    dataset = random_dataset(rows)
    blocks = [dataset.take(slice(start, start + block)) for start in range(0, rows, block)]
    seen_rows, buckets_of_short_batches = [], []
    for group, part in batches_by_bucket(blocks, batch_size, BUCKETS):
        assert 1 <= len(group) == len(part) <= batch_size
        width_of_batch = part.input_ids.shape[1]
        lengths = dataset.lengths[group]
        expected = [min(bucket for bucket in BUCKETS if bucket >= length) for length in lengths]
        assert expected == [width_of_batch] * len(group)
        width = min(width_of_batch, dataset.input_ids.shape[1])
        np.testing.assert_array_equal(part.lengths, lengths)
        np.testing.assert_array_equal(part.input_ids[:, :width], dataset.input_ids[group, :width])
        assert not part.attention_mask[:, width:].any()
        np.testing.assert_array_equal(part.labels, dataset.labels[group])
        if len(group) < batch_size:
            buckets_of_short_batches.append(width_of_batch)
        seen_rows.extend(group)
    assert sorted(seen_rows) == list(range(rows))
    assert len(buckets_of_short_batches) == len(set(buckets_of_short_batches)), (
        "only the last batch of a bucket may have fewer than batch_size rows"
    )


def test_a_batch_is_yielded_as_soon_as_its_bucket_is_full():
    """The device then computes while later texts are tokenized."""
    blocks_read = []

    def blocks():
        for number in range(4):
            blocks_read.append(number)
            yield dataset_of([5, 5])

    batches = batches_by_bucket(blocks(), 4, BUCKETS)
    assert next(batches)[0].tolist() == [0, 1, 2, 3] and blocks_read == [0, 1]
    assert next(batches)[0].tolist() == [4, 5, 6, 7] and blocks_read == [0, 1, 2, 3]


@pytest.mark.parametrize("devices", [1, 3])
def test_packed_blocks_hold_every_row_once_without_padding(devices):
    """Long rows among short rows, one row, and numbers of rows that fill a pool exactly."""
    random = np.random.default_rng(0)
    for num_rows in (1, 4, 37, 64):
        lengths = random.choice([1, 2, 3, 20], num_rows, p=[0.3, 0.3, 0.3, 0.1])
        mask = (np.arange(20) < lengths[:, None]).astype(np.int8)
        ids = np.where(mask, np.arange(num_rows)[:, None] * 100 + np.arange(20) + 1, 0)
        dataset = Dataset(ids.astype(np.int32), mask, mask)
        parts = [dataset.take(slice(start, start + 10)) for start in range(0, num_rows, 10)]
        seen = []
        for rows, part in blocks_that_fit(parts, max_rows=8, max_tokens=40):
            assert len(part) <= 8 and part.lengths.sum() <= 40
            batch, places = packed(part, devices, 8, 40 // devices + 20, 20)
            tokens = [values.reshape(devices, -1) for values in batch]
            for row, place in zip(rows, places, strict=True):
                device, index = divmod(place, 8)
                starts = np.cumsum(tokens[-1][device]) - tokens[-1][device]
                its = slice(starts[index], starts[index] + lengths[row])
                np.testing.assert_array_equal(tokens[0][device, its], ids[row, : lengths[row]])
                np.testing.assert_array_equal(tokens[3][device, its], np.arange(lengths[row]))
            assert batch.lengths.sum() == batch.attention_mask.sum() == part.lengths.sum()
            assert (np.diff(tokens[-1], axis=1) <= 0).all(), "a device's longest row comes first"
            seen += rows.tolist()
        assert seen == list(range(num_rows))
