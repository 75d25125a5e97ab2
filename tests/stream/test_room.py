"""The folder of remote shards on a node: its size, its owner, its full disk."""

import contextlib
import errno
import logging
import os
import shutil
import time

import numpy as np
import pytest
from web import equal, forget, kept, opened

from mlvicx_dist.errors import DataError
from mlvicx_dist.ingest.shards import read_manifest
from mlvicx_dist.stream import cache as caches
from mlvicx_dist.stream import part as parts
from mlvicx_dist.stream import room as rooms
from mlvicx_dist.stream.cache import Cache


@pytest.fixture
def _in_use_no_longer(monkeypatch):
    monkeypatch.setattr(rooms, "IN_USE_S", 0)


@pytest.mark.usefixtures("_in_use_no_longer")
def test_the_folder_stays_within_its_size(store, cache, images, caplog):
    sizes = [info.bytes for info in read_manifest(store.folder).shards]
    cache = Cache(cache.folder, 4 * max(sizes))
    shards = opened(store, cache)
    for sample in range(60):
        assert np.array_equal(shards.image(sample), images[sample])
        assert sum(path.stat().st_size for path in cache.path().iterdir()) <= cache.limit_bytes
    assert len(kept(cache, ".part")) >= 2
    assert caplog.records == []


def test_an_index_that_is_renamed_meanwhile_is_no_loss(store, cache, monkeypatch):
    shards = opened(store, cache)
    shards.image(0)
    passing = cache.path() / f".{shards.shards[0].info.sha256}.index.npy.1.partial"
    passing.touch()
    scan = os.scandir

    def scandir(path):
        entries = list(scan(path))
        passing.unlink()
        return contextlib.nullcontext(entries)

    monkeypatch.setattr(os, "scandir", scandir)
    assert len(shards.shards[1].read(0, 9)) == 9
    assert not passing.exists()


@pytest.mark.usefixtures("_in_use_no_longer")
def test_what_was_used_least_recently_goes_first(store, cache):
    whole = opened(store, cache).shards
    sizes = [parts.kept_bytes(shard.info) for shard in whole]
    cache = Cache(cache.folder, sum(sizes[:3]) + 300)
    shards = opened(store, cache).shards
    for age, number in enumerate([1, 2, 0]):
        shards[number].fill()
        for path in cache.path().glob(f"{shards[number].info.sha256}.*"):
            os.utime(path, (0, time.time() - 1000 + age))
    (cache.path() / "notes.txt").write_text("not ours")
    caches._parts.clear()
    assert shards[3].fill()
    there = {path.name[:64] for path in kept(cache, ".tar")}
    assert {shards[0].info.sha256, shards[3].info.sha256} <= there
    assert shards[1].info.sha256 not in there
    # Where one is not enough, more go, and no more than must.
    opened(store, Cache(cache.folder, sum(sizes[3:5]) + 300)).shards[4].fill()
    there = {path.name[:64] for path in kept(cache, ".tar")}
    assert there == {shards[3].info.sha256, shards[4].info.sha256}
    assert (cache.path() / "notes.txt").exists()


def test_a_shard_that_was_removed_is_fetched_again_by_who_had_it(store, cache, images, monkeypatch):
    shards = opened(store, cache)
    assert shards.shards[0].fill()
    for path in cache.path().glob(f"{shards.shards[0].info.sha256}.*"):
        path.unlink()
    before = store.shard_bytes()
    assert np.array_equal(shards.image(0), images[0])
    assert store.shard_bytes() == before
    part = caches._part(shards.shards[0])
    part._touched_s -= rooms.IN_USE_S
    assert np.array_equal(shards.image(0), images[0])
    assert store.shard_bytes() > before
    assert len(kept(cache, ".part")) == 1


def test_a_cache_that_is_too_small_is_passed_by(store, cache, images, caplog):
    cache = Cache(cache.folder, 100)
    shards = opened(store, cache)
    assert equal([shards.image(sample) for sample in range(60)], images)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "data.cache_gb = 1e-07 is too little" in record.getMessage()
    assert "0.01 GB would hold all" in record.getMessage()
    assert kept(cache, ".part") == kept(cache, ".tar") == []
    # The bytes that were asked for, in no blocks.
    images_bytes = sum(
        int(index["image_size"].sum())
        for index in (np.load(path) for path in store.folder.glob("*.npy"))
    )
    assert store.shard_bytes() == images_bytes


def test_shards_in_use_are_not_removed(store, cache, images):
    sizes = [info.bytes for info in read_manifest(store.folder).shards]
    cache = Cache(cache.folder, 3 * max(sizes))
    shards = opened(store, cache)
    assert equal([shards.image(sample) for sample in range(60)], images)
    held = {path.name[:64] for path in kept(cache, ".part") + kept(cache, ".tar")}
    assert held == {shard.info.sha256 for shard in shards.shards[: len(held)]}
    assert 0 < len(held) < len(shards.shards)
    # Who uses one says so now and then.
    (path,) = cache.path().glob(f"{shards.shards[0].info.sha256}.[pt]*")
    os.utime(path, (0, 0))
    caches._part(shards.shards[0])._touched_s -= rooms.IN_USE_S
    shards.image(0)
    assert path.stat().st_mtime > time.time() - 60


@pytest.mark.parametrize("small_disk", ["size=64k", "nr_inodes=6"], indirect=True)
def test_a_full_disk_stops_nothing(store, images, small_disk, caplog):
    shards = opened(store, Cache(small_disk / "cache"))
    assert equal([shards.image(sample) for sample in range(60)], images)
    assert equal([shards.image(sample) for sample in range(60)], images)
    (record,) = caplog.records
    assert os.strerror(errno.ENOSPC) in record.getMessage()
    forget()


def test_a_folder_that_cannot_be_used_is_named(store, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/cache: .*set data.cache_dir"):
        opened(store, Cache(tmp_path / "file" / "cache")).image(0)
    shards = opened(store, Cache(tmp_path / "cache"))
    shards.image(0)
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").touch()
    with pytest.raises(DataError, match=r"/cache: .*set data.cache_dir"):
        shards.shards[1].read(0, 9)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_the_folder_of_another_user_is_refused(store, tmp_path):
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", 12345, 12345)
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    for name in ("theirs", "link"):
        with pytest.raises(DataError, match=f"{name}: .*belongs to another user; set data.cache_d"):
            opened(store, Cache(tmp_path / name)).image(0)
