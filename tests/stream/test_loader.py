"""Batches: the same samples and views for any number of ranks, loader processes and restarts."""

import gc
import multiprocessing
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mlvicx_dist.config import Views
from mlvicx_dist.errors import DataError, ResourceError
from mlvicx_dist.ingest.shards import read_manifest
from mlvicx_dist.stream import loader
from mlvicx_dist.stream.loader import Steps, batches
from mlvicx_dist.stream.order import epoch_order
from mlvicx_dist.stream.shardset import ShardSet, _Descriptor

VIEWS = Views(image_size_px=24, blur_kernel_px=5)


@pytest.fixture(scope="module")
def shards(phantom_shards):
    return ShardSet.open([phantom_shards], splits=["train", "val"])


def collect(shards, *, start=0, stop=12, rank=0, world_size=1, workers=0):
    steps = Steps(shards, VIEWS, batch=7, seed=3, rank=rank, world_size=world_size)
    return list(batches(steps, start=start, stop=stop, workers=workers))


def same(first, second):
    return all(
        a.step == b.step
        and torch.equal(a.samples, b.samples)
        and torch.equal(a.images, b.images)
        and torch.equal(a.table, b.table)
        for a, b in zip(first, second, strict=True)
    )


def test_loader_processes_change_nothing(shards):
    assert same(collect(shards), collect(shards, workers=2))


def test_a_restart_at_a_step_sees_what_would_have_come(shards):
    assert same(collect(shards)[5:], collect(shards, start=5))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_see_the_batch_of_one(shards, world_size):
    alone = collect(shards)
    parts = [collect(shards, rank=rank, world_size=world_size) for rank in range(world_size)]
    for one, shares in zip(alone, zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat([s.samples for s in shares]), one.samples)
        assert torch.equal(torch.cat([s.images for s in shares], 1), one.images)
        assert torch.equal(torch.cat([s.table for s in shares], 1), one.table)


def test_a_step_is_a_column_of_the_order(shards):
    order = epoch_order(shards.sizes, 7, 3, 0)
    for batch in collect(shards, stop=order.shape[1]):
        assert batch.samples.tolist() == order[:, batch.step].tolist()


def test_an_epoch_is_followed_by_another_one_in_another_order(shards):
    steps = epoch_order(shards.sizes, 7, 3, 0).shape[1]
    seen = collect(shards, stop=2 * steps)
    first, second = seen[:steps], seen[steps:]
    assert not same(first[:1], [type(b)(0, b.samples, b.images, b.table) for b in second[:1]])
    assert len({s for b in second for s in b.samples.tolist()}) == 7 * steps


def test_two_folders_are_one_set(phantom_shards, tmp_path):
    copy = shutil.copytree(phantom_shards, tmp_path / "copy")
    both = ShardSet.open([phantom_shards, copy], splits=["train"], weights=[1.0, 0.5])
    alone = ShardSet.open([phantom_shards], splits=["train"])
    assert len(both) == 2 * len(alone)
    assert both.key(len(alone)) == alone.key(0)
    order = epoch_order(both.sizes, 2, 0, 0, both.weights)
    light = (order >= len(alone)).sum()
    assert abs(light - len(alone) / 2) <= 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_cut_short_is_named(phantom_shards, tmp_path, workers):
    shards = shutil.copytree(phantom_shards, tmp_path / "cut")
    for info in read_manifest(shards).shards:
        path = shards / info.name
        path.write_bytes(path.read_bytes()[:2048])
    with pytest.raises(DataError, match=r"cut/(train|val)-.*mlvicx verify"):
        collect(ShardSet.open([shards], splits=["train", "val"]), workers=workers)


def test_sixteen_bits_become_eight():
    import numpy as np

    from mlvicx_dist.stream.loader import as_bytes

    deep = np.array([[0, 255, 256, 65535]], np.uint16)
    assert as_bytes(deep).tolist() == [[0, 0, 1, 255]]


def in_a_thread(function):
    """As Ray does: PyTorch's signal handler for lost processes lives in the main thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_a_loader_process_that_is_killed_is_replaced(shards):
    def attacked():
        found, before = [], set(multiprocessing.active_children())
        steps = Steps(shards, VIEWS, batch=7, seed=3)
        for batch in batches(steps, start=0, stop=12, workers=1):
            found.append(batch)
            if batch.step == 1:
                (process,) = set(multiprocessing.active_children()) - before
                process.kill()
                process.join()
        return found

    assert same(collect(shards), in_a_thread(attacked))


def test_loader_processes_that_die_again_and_again_are_one_sentence(shards, monkeypatch):
    monkeypatch.setattr(Steps, "_batch", lambda self, step: os._exit(1))
    monkeypatch.setattr(loader, "LOSSES", 1)
    with pytest.raises(ResourceError, match=r"step 0: loader processes died 2 times in a row"):
        in_a_thread(lambda: collect(shards, workers=1))


def test_what_fails_in_a_loader_process_is_not_taken_for_its_death(shards, monkeypatch):
    def fail(self, step):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(Steps, "_batch", fail)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        in_a_thread(lambda: collect(shards, workers=1))


class Deadly(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, place):
        os._exit(1)


def test_a_loader_process_that_dies_beside_an_evaluation_is_one_sentence():
    images = torch.utils.data.DataLoader(Deadly(), num_workers=1, collate_fn=list)
    with pytest.raises(ResourceError, match="a loader process died"):
        in_a_thread(lambda: list(loader.lists_of(images)))


def test_a_split_that_no_folder_has_is_named(phantom_shards):
    with pytest.raises(DataError, match=r"no split 'vall' \(did you mean 'val'\?\)"):
        ShardSet.open([phantom_shards], splits=["train", "vall"])


@pytest.mark.parametrize(("there", "instead"), [(b'"source"', b"!source!"), (b'"sex"', b'"six"')])
def test_a_damaged_description_of_a_sample_is_one_sentence(
    phantom_shards, tmp_path, there, instead
):
    folder = shutil.copytree(phantom_shards, tmp_path / "shards")
    path = next(folder.glob("train-*.tar"))
    path.write_bytes(path.read_bytes().replace(there, instead, 1))
    shards = ShardSet.open([folder], splits=["train"])
    with pytest.raises(DataError, match=r"tells of [0-9a-f]+ is damaged; run 'mlvicx verify /"):
        for sample in range(len(shards)):
            shards.about(sample)


def test_a_shard_that_cannot_be_opened_is_one_error(tmp_path, monkeypatch):
    unraised = []
    monkeypatch.setattr(sys, "unraisablehook", unraised.append)
    with pytest.raises(FileNotFoundError):
        _Descriptor(tmp_path / "gone")
    gc.collect()
    assert unraised == []
