"""The order of samples: a pure function with exact properties (DESIGN 3.1)."""

import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlvicx_dist.errors import DataError
from mlvicx_dist.stream import order
from mlvicx_dist.stream.order import epoch_lanes, epoch_order, rank_lanes, steps_per_epoch

sizes = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@settings(deadline=None, max_examples=150)
@given(sizes, st.integers(1, 20), st.integers(0, 2**63 - 1), st.integers(0, 50))
def test_each_sample_at_most_once_and_the_exact_count(shard_sizes, batch, seed, epoch):
    n = sum(shard_sizes)
    if batch > n:
        with pytest.raises(DataError):
            epoch_order(shard_sizes, batch, seed, epoch)
        return
    lanes = epoch_order(shard_sizes, batch, seed, epoch)
    assert lanes.shape == (batch, n // batch)
    assert len(np.unique(lanes)) == lanes.size
    assert lanes.min() >= 0
    assert lanes.max() < n


@settings(deadline=None, max_examples=100)
@given(
    sizes,
    st.integers(1, 20),
    st.integers(0, 1000),
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 24)), min_size=1, max_size=6),
)
def test_groups_of_any_size_that_take_over_at_any_step_read_an_epoch_once(
    shard_sizes, batch, seed, groups
):
    # Each group is (its size, how many steps it does until the next one takes over).
    n = sum(shard_sizes)
    if batch > n:
        return
    steps = n // batch

    @cache
    def read_by(rank, world_size, epoch):
        lanes, folder = rank_lanes(batch, rank, world_size), Path("unused")
        return epoch_lanes(shard_sizes, batch, seed, epoch, lanes=lanes, folder=folder)

    read = {0: [], 1: []}
    step, turn = 0, 0
    while step < 2 * steps:
        world_size, share = groups[turn % len(groups)]
        turn += 1
        for at in range(step, min(step + share, 2 * steps)):
            epoch, column = divmod(at, steps)
            for rank in range(world_size):
                read[epoch] += read_by(rank, world_size, epoch)[:, column].tolist()
        step += share
    for samples in read.values():
        assert len(samples) == len(set(samples)) == batch * steps


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.sampled_from([0.1, 0.25, 1.0, 3.0])),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 5),
    st.integers(0, 20),
)
def test_weights_thin_out_and_never_repeat(shards, batch, epoch):
    shard_sizes, weights = [s for s, _ in shards], [w for _, w in shards]
    expected = sum(s * w / max(weights) for s, w in shards)
    if batch > expected + 1e-6:
        return
    lanes = epoch_order(shard_sizes, batch, 7, epoch, weights)
    assert lanes.shape[1] == steps_per_epoch(shard_sizes, batch, weights)
    assert lanes.size <= expected + 1e-6 < lanes.size + batch + 1
    assert len(np.unique(lanes)) == lanes.size


def test_a_lighter_folder_shows_another_part_of_itself_each_epoch():
    seen = [epoch_order([100, 100], 10, 0, e, [1.0, 0.25]) for e in range(20)]
    light = [set(lanes[lanes >= 100].tolist()) for lanes in seen]
    assert all(20 <= len(part) <= 25 for part in light)  # the remainder waits
    assert len(set.union(*light)) > 95


@given(st.integers(1, 300), st.integers(1, 40))
def test_ranks_cut_the_lanes_as_array_split_does(batch, world_size):
    lanes = np.arange(batch)
    for rank, part in enumerate(np.array_split(lanes, world_size)):
        assert lanes[rank_lanes(batch, rank, world_size)].tolist() == part.tolist()


def test_a_lane_passes_through_its_shards_one_after_the_other():
    lanes = epoch_order([50] * 8, 4, 3, 0)
    for lane in lanes:
        shards = lane // 50
        changes = np.count_nonzero(np.diff(shards))
        assert changes == len(np.unique(shards)) - 1


def test_the_order_is_fixed_for_ever():
    """The bytes themselves: another order would break the resume of every run made before."""
    first = epoch_order([5, 7, 9], 4, seed=11, epoch=2)
    assert first.tolist() == [
        [9, 5, 7, 11, 6],
        [10, 8, 16, 18, 20],
        [17, 13, 15, 12, 14],
        [19, 2, 1, 0, 4],
    ]
    assert not np.array_equal(first, epoch_order([5, 7, 9], 4, seed=11, epoch=3))
    assert not np.array_equal(first, epoch_order([5, 7, 9], 4, seed=12, epoch=2))


def test_a_large_order_is_one_file_a_node(tmp_path, monkeypatch):
    monkeypatch.setattr(order, "IN_MEMORY_BYTES", 0)
    whole = epoch_order([30, 40], 6, 5, 4)
    for rank in range(3):
        lanes = rank_lanes(6, rank, 3)
        part = epoch_lanes([30, 40], 6, 5, 4, lanes=lanes, folder=tmp_path)
        assert isinstance(part, np.memmap)
        assert np.array_equal(part, whole[lanes])
    assert len(list(tmp_path.glob("*.npy"))) == 1
    for epoch in (5, 6):
        epoch_lanes([30, 40], 6, 5, epoch, lanes=slice(0, 6), folder=tmp_path)
    assert sorted(p.stem[-1] for p in tmp_path.glob("*.npy")) == ["5", "6"]


def test_where_an_order_cannot_be_kept_it_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(order, "IN_MEMORY_BYTES", 0)
    (tmp_path / "file").touch()
    lanes = epoch_lanes([30, 40], 6, 5, 4, lanes=slice(1, 3), folder=tmp_path / "file")
    assert np.array_equal(lanes, epoch_order([30, 40], 6, 5, 4)[1:3])


def test_the_orders_of_runs_that_ended_go(tmp_path, monkeypatch):
    monkeypatch.setattr(order, "IN_MEMORY_BYTES", 0)
    for seed in (1, 2):
        epoch_lanes([30, 40], 6, seed, 0, lanes=slice(0, 6), folder=tmp_path)
    old = min(tmp_path.glob("*.npy"))
    os.utime(old, (0, 0))
    epoch_lanes([30, 40], 6, 3, 0, lanes=slice(0, 6), folder=tmp_path)
    assert not old.exists()
    assert len(list(tmp_path.glob("*.npy"))) == 2


def test_a_batch_larger_than_the_data_says_so():
    with pytest.raises(DataError, match=r"batch of 64 .* 12 images .* train.batch_size"):
        steps_per_epoch([5, 7], 64)
