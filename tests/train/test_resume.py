"""Interrupted at any step and at any size, a run ends where it would have ended."""

import random
from functools import partial

import pytest
import torch
from group import At, run_group, settings
from samples import check_epochs, trajectory

from mlvicx_dist.train.checkpoint import newest_checkpoint, read_checkpoint
from mlvicx_dist.train.notices import Notice
from mlvicx_dist.train.runlog import read_rows

STEPS = 12
CHANGES = {
    "none": {},
    "rows": {"train__gather_rows": True, "model__projector": {"width": 160}},
}


def last(run_dir):
    state = read_checkpoint(newest_checkpoint(run_dir))
    return state["step"], state["model"], state["optimizer"]["state"]


@pytest.fixture(scope="module")
def uninterrupted(phantom_shards, tmp_path_factory):
    """The end of a whole run, by the size of the group and by what is changed."""
    ends = {}

    def end(world_size, changes="none"):
        if (world_size, changes) not in ends:
            runs = tmp_path_factory.mktemp("whole")
            tree = settings(phantom_shards, runs, **CHANGES[changes])
            assert not run_group(tree, runs / "small", world_size)
            ends[world_size, changes] = (runs, last(runs / "small"))
        return ends[world_size, changes]

    return end


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [(1, "none"), (2, "none"), (2, "rows"), pytest.param(3, "none", marks=pytest.mark.slow)],
)
def test_killed_at_random_steps_it_ends_bitwise_equal(
    uninterrupted, phantom_shards, tmp_path, world_size, changes
):
    whole, (steps, weights, moments) = uninterrupted(world_size, changes)
    assert steps == STEPS
    chance = random.Random(world_size)
    kills = sorted(chance.sample(range(1, STEPS), 2))
    tree = settings(phantom_shards, tmp_path, **CHANGES[changes])
    for kill in kills:
        victim = chance.randrange(world_size)
        assert run_group(tree, tmp_path / "small", world_size, kill_at=(victim, kill))
    assert not run_group(tree, tmp_path / "small", world_size)
    steps, found, found_moments = last(tmp_path / "small")
    assert steps == STEPS
    for name in weights:
        assert torch.equal(found[name], weights[name]), name
    for key, moment in moments.items():
        for name in moment:
            assert torch.equal(found_moments[key][name], moment[name])
    seen, times = trajectory(tmp_path / "samples")
    assert seen == trajectory(whole / "samples")[0]
    assert max(times.values()) <= 3
    # Of the steps after a checkpoint, every second one, at most two are done again.
    assert sum(times.values()) - STEPS <= 2 * len(kills) * 2
    rows = read_rows(tmp_path / "small" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("changes", list(CHANGES))
def test_sizes_that_change_on_the_way_end_within_rounding(phantom_shards, tmp_path, changes):
    # A small learning rate: a large one makes any rounding grow, that of another size too.
    gentle = {"train__optimizer": "lars", "train__warmup_epochs": 3, **CHANGES[changes]}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    double = partial(run_group, kind=torch.float64)
    double(settings(phantom_shards, whole, **gentle), whole / "small", 1)
    tree = settings(phantom_shards, parts, **gentle)
    double(tree, parts / "small", 2, notices=At(Notice.STOP, 3))
    double(tree, parts / "small", 3, notices=At(Notice.STOP, 3))
    double(tree, parts / "small", 1)
    steps, weights, _ = last(whole / "small")
    assert steps == last(parts / "small")[0] == STEPS
    found = last(parts / "small")[1]
    names = [name for name, w in weights.items() if w.is_floating_point()]
    largest = max(weights[name].abs().max() for name in names)
    apart = max((found[name] - weights[name]).abs().max() for name in names)
    assert apart < 1e-10 * largest
    seen, times = trajectory(parts / "samples")
    assert set(times.values()) == {1}
    assert seen == trajectory(whole / "samples")[0]


def test_each_sample_comes_at_most_once_an_epoch(uninterrupted):
    seen, _ = trajectory(uninterrupted(1)[0] / "samples")
    assert len(seen) == STEPS
    check_epochs(seen, STEPS // 3, 7)


def test_a_group_that_is_to_leave_saves_first(phantom_shards, tmp_path):
    tree = settings(phantom_shards, tmp_path, checkpoint__every_steps=100)
    assert run_group(tree, tmp_path / "small", 2, notices=At(Notice.REGROUP, 3))
    # Said at step 3, heard by both at step 4.
    assert last(tmp_path / "small")[0] == 4
    assert not run_group(tree, tmp_path / "small", 1)
    assert set(trajectory(tmp_path / "samples")[1].values()) == {1}


def test_a_group_whose_run_was_taken_writes_nothing_more(phantom_shards, tmp_path):
    tree = settings(phantom_shards, tmp_path)
    assert run_group(tree, tmp_path / "small", 2, taken_at=6)
    assert last(tmp_path / "small")[0] in (4, 5)
    assert [row["step"] for row in read_rows(tmp_path / "small" / "metrics.jsonl")] == [
        1,
        2,
        3,
        4,
        5,
    ]
