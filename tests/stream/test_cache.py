"""Remote shards: each byte once a node, the bytes of the manifest, whatever the store does."""

import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from web import BLOCK, FORK, SPLITS, VIEWS, equal, forget, kept, opened, read_to, same, upload

from mlvicx_dist.config import LocalHead, Model, Projector, parse_config
from mlvicx_dist.errors import ConfigError, DataError
from mlvicx_dist.evaluate.embed import embed_shards
from mlvicx_dist.ingest.shards import index_path, read_manifest
from mlvicx_dist.model.encoder import Encoder
from mlvicx_dist.model.mlvicx import build_model
from mlvicx_dist.report.contact import contact_sheet
from mlvicx_dist.storage import place, read_bytes, read_range
from mlvicx_dist.stream import part as parts
from mlvicx_dist.stream import room as rooms
from mlvicx_dist.stream.cache import Cache, cache_of
from mlvicx_dist.stream.loader import Steps, batches
from mlvicx_dist.stream.shardset import ShardSet


@pytest.mark.parametrize("among", ["processes", "threads"])
def test_each_byte_is_downloaded_once_by_all_readers_together(
    store, cache, images, tmp_path, among
):
    store.pause_s = 0.01
    kind = FORK.Process if among == "processes" else threading.Thread
    barrier = (FORK if among == "processes" else threading).Barrier(3)
    shards = opened(store, cache)
    orders = [list(range(60)), list(range(59, -1, -1)), list(range(60))]
    files = [tmp_path / f"{number}.npy" for number in range(3)]
    readers = [
        kind(target=read_to, args=(shards, order, barrier, file))
        for order, file in zip(orders, files, strict=True)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    for order, file in zip(orders, files, strict=True):
        assert np.load(file).tolist() == [images[sample].sum() for sample in order]
    for info in read_manifest(store.folder).shards:
        index = index_path(store.folder / info.name)
        assert store.served[info.name] <= info.bytes
        assert store.served[index.name] == index.stat().st_size
    for shard in shards.shards:
        assert shard.fill()
    assert store.shard_bytes() == sum(info.bytes for info in read_manifest(store.folder).shards)
    assert max(size for name, _, size in store.ranges if name.endswith(".tar")) > BLOCK


def test_a_later_run_downloads_nothing(store, cache, images):
    shards = opened(store, cache)
    assert equal([shards.image(sample) for sample in range(60)], images)
    assert all(shard.fill() for shard in shards.shards)
    assert len(kept(cache, ".tar")) == len(shards.shards)
    assert kept(cache, ".part") == []
    assert {path.name[:64] for path in kept(cache, ".tar")} == {
        shard.info.sha256 for shard in shards.shards
    }
    forget()
    before = len(store.ranges)
    again = pickle.loads(pickle.dumps(opened(store, cache)))
    assert equal([again.image(sample) for sample in range(60)], images)
    assert len(store.ranges) == before


def test_local_shards_are_read_where_they_are(phantom_shards, cache, images):
    shards = ShardSet.open([phantom_shards], splits=SPLITS, cache=cache)
    assert equal([shards.image(sample) for sample in range(60)], images)
    assert not cache.path().exists()


def test_a_reader_that_is_killed_in_a_fetch_leaves_nothing_stuck(store, cache, images):
    shards = opened(store, cache)
    store.go_on.clear()
    reader = FORK.Process(target=shards.image, args=(0,))
    reader.start()
    assert store.stalled.wait(20)
    locks = rooms.room_at(cache.path()).locks
    slot = parts.slot(shards.shards[0].info)
    with locks.hold(slot, parts.FINISH, wait=False) as free:
        assert not free
    os.kill(reader.pid, signal.SIGKILL)
    reader.join()
    store.go_on.set()
    assert equal([shards.image(sample) for sample in range(60)], images)
    assert all(shard.fill() for shard in shards.shards)


def test_marks_that_outlived_their_blocks_are_not_believed(store, cache, monkeypatch):
    shards = opened(store, cache)
    known = shards.about(0)
    (part,) = kept(cache, ".part")
    with part.open("r+b") as file:
        file.write(bytes(shards.shards[0].info.bytes))
    forget()
    monkeypatch.setattr(parts, "_boot_s", lambda: time.time() + 60)
    assert shards.about(0) == known


def test_a_process_that_ends_between_the_check_and_the_name_loses_nothing(store, cache, images):
    shards = opened(store, cache)
    assert shards.shards[0].fill()
    (final,) = kept(cache, ".tar")
    final.rename(final.with_suffix(".part"))
    forget()
    before = store.shard_bytes()
    assert np.array_equal(shards.image(0), images[0])
    assert kept(cache, ".tar") == [final]
    assert store.shard_bytes() == before


def test_bytes_that_are_not_the_manifests_stop_the_run_with_a_sentence(store, cache, monkeypatch):
    shards = opened(store, cache)
    info = shards.shards[0].info
    data = bytearray((store.folder / info.name).read_bytes())
    good = bytes(data)
    data[-1] ^= 1
    (store.folder / info.name).write_bytes(data)
    words = f"{store.url}/{info.name}: its bytes in the store are not those .*mlvicx verify"
    with pytest.raises(DataError, match=words):
        shards.shards[0].fill()
    assert store.served[info.name] == 2 * info.bytes
    # Who had it open, and who opens it now, hear the same.
    with pytest.raises(DataError, match=words):
        shards.image(0)
    forget()
    with pytest.raises(DataError, match=words):
        shards.image(0)
    assert store.served[info.name] == 2 * info.bytes
    # A later run finds the store mended.
    (store.folder / info.name).write_bytes(good)
    forget()
    monkeypatch.setattr(rooms, "IN_USE_S", 0)
    assert shards.shards[0].fill()


def test_bytes_that_went_wrong_on_the_way_are_fetched_again(store, cache, images):
    store.spoilt = 2
    shards = opened(store, cache)
    assert equal([shards.image(sample) for sample in range(60)], images)


def test_an_image_that_cannot_be_decoded_leads_to_the_store(store, cache):
    shards = opened(store, cache)
    info = shards.shards[0].info
    (store.folder / info.name).write_bytes(bytes(info.bytes))
    with pytest.raises(DataError, match=f"{info.name}: its bytes in the store are not those"):
        shards.image(0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_is_missing_stops_the_run_at_once(store, cache, clock, workers):
    shards = opened(store, cache)
    name = shards.shards[1].info.name
    (store.folder / name).unlink()
    steps = Steps(shards, VIEWS, batch=7, seed=3)
    words = f"{store.url}/{name}: there is no such file; run 'mlvicx verify {store.url}/'"
    with pytest.raises(DataError, match=words):
        list(batches(steps, start=0, stop=12, workers=workers))
    assert clock.pauses_s == []
    assert multiprocessing.active_children() == []


def test_a_store_that_fails_for_a_while_is_asked_again(store, cache, images, clock):
    shards = opened(store, cache)
    store.refused, store.cut = 3, 2
    assert equal([shards.image(sample) for sample in range(60)], images)
    # The index meets three refusals, and the first block two connections that break.
    waits = [1, 2, 4, 1, 2]
    assert clock.pauses_s == [pytest.approx(wait, rel=0.21) for wait in waits]


def test_a_manifest_is_waited_for_by_who_has_patience(store, clock):
    store.manifest_refused = 5
    assert read_manifest(store.url, patience_s=300).splits
    assert len(clock.pauses_s) == 5
    store.manifest_refused = 10**6
    # That the store does not answer says nothing of what is in it.
    with pytest.raises(DataError, match=r"it cannot be reached \(.*503"):
        read_manifest(store.url)
    store.manifest_refused = 0
    with pytest.raises(DataError, match="there is no such folder of shards"):
        read_manifest(f"{store.url}/gone")


def test_patience_ends_with_a_sentence(store, cache, clock):
    shards = opened(store, cache)
    shards.image(0)
    store.refused = 10**6
    words = r"test-000000\.tar: it could not be read for 300 s \(.*503"
    with pytest.raises(DataError, match=words):
        shards.image(7)
    assert clock.now_s == pytest.approx(300)
    assert 24 < max(clock.pauses_s) < 36.1
    with pytest.raises(DataError, match=r"index\.npy: it could not be read for 300 s"):
        shards.image(59)
    clock.pauses_s.clear()
    with pytest.raises(OSError, match="503"):
        read_bytes(place(f"{store.url}/{shards.shards[0].info.name}"))
    assert len(clock.pauses_s) == 2


def test_a_server_without_ranges_is_named(store, cache, clock):
    store.ranged = False
    with pytest.raises(DataError, match="sends the whole file where a part was asked for"):
        opened(store, cache).image(0)
    assert clock.pauses_s == []


def test_a_range_is_whole_or_an_error(tmp_path, s3, clock):
    for folder in (tmp_path, place(f"{s3}/deep")):
        (folder / "a").write_bytes(b"0123456789")
        assert read_range(folder / "a", 3, 4) == b"3456"
        assert read_range(folder / "a", 3, 0) == b""
        with pytest.raises(DataError, match="4 bytes came where 9 were asked for"):
            read_range(folder / "a", 6, 9, patience_s=5)
        with pytest.raises(DataError, match="no such file"):
            read_range(folder / "b", 0, 1)
    assert clock.now_s == pytest.approx(5)


def test_an_index_that_was_damaged_here_is_fetched_again(store, cache, images):
    shards = opened(store, cache)
    shards.image(0)
    (cache.path() / f"{shards.shards[0].info.sha256}.index.npy").write_bytes(b"x")
    forget()
    assert np.array_equal(shards.image(0), images[0])


@pytest.mark.parametrize("damage", ["cut", "rows", "outside", "missing"])
def test_an_index_that_is_damaged_in_the_store_is_named(store, cache, damage):
    shards = opened(store, cache)
    path = index_path(store.folder / shards.shards[0].info.name)
    index = np.load(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "rows":
        np.save(path, index[:-1])
    elif damage == "outside":
        index["image_offset"][3] = shards.shards[0].info.bytes
        np.save(path, index)
    else:
        path.unlink()
    words = f"{store.url}/{path.name}: the index is missing or damaged; run 'mlvicx verify http"
    with pytest.raises(DataError, match=words):
        shards.image(0)


def test_loader_processes_read_from_s3(phantom_shards, s3, cache):
    remote = ShardSet.open([upload(phantom_shards, f"{s3}/shards")], splits=SPLITS, cache=cache)
    local = ShardSet.open([phantom_shards], splits=SPLITS)
    # What this process has of the store must not reach its children.
    remote.image(0)
    runs = [
        list(batches(Steps(shards, VIEWS, batch=7, seed=3), start=0, stop=16, workers=2))
        for shards in (remote, local)
    ]
    assert same(*runs)
    assert len(kept(cache, ".tar") + kept(cache, ".part")) == len(remote.shards)


def test_embeddings_and_contact_sheets_are_those_of_the_local_folder(
    phantom_shards, s3, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    url = upload(phantom_shards, f"{s3}/shards")
    settings = Model(local=LocalHead(resize_px=8, channels=4, pool=2), projector=Projector(width=8))
    encoder = Encoder.from_model(build_model(settings, 0), 32)
    remote, local = (
        embed_shards([encoder], [folder], loader_workers=1) for folder in (url, phantom_shards)
    )
    assert np.array_equal(remote.features[0], local.features[0])
    assert remote.about == local.about
    sheets = [contact_sheet([folder], VIEWS, count=4)[0] for folder in (url, phantom_shards)]
    assert sheets[0].tobytes() == sheets[1].tobytes()
    folder = tmp_path / f"mlvicx-cache-{os.geteuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("url", ["pipe:cat /etc/passwd", "ftp://host/shards"])
def test_places_that_are_none_of_ours_are_refused(url):
    with pytest.raises(DataError, match="is no place that can be used"):
        ShardSet.open([url], splits=["train"])


def test_the_settings_name_folder_and_size(tmp_path):
    def data(**values):
        tree = {"kind": "pretrain", "run": {"name": "a"}}
        return parse_config(tree | {"data": {"shards": [{"path": "x"}], **values}}, "test").data

    assert cache_of(data()) == Cache(None, 50 * 10**9)
    assert cache_of(data(cache_dir="c", cache_gb=0.5)) == Cache(Path("c").absolute(), 5 * 10**8)
    with pytest.raises(ConfigError, match=r"data\.cache_gb"):
        data(cache_gb=0)
