"""Remote shards: each byte once a node, the bytes of the manifest, whatever the store does."""

import contextlib
import errno
import http.server
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from mlvicx_dist import storage
from mlvicx_dist.config import ConfigError, LocalHead, Model, Projector, Views, parse_config
from mlvicx_dist.errors import DataError
from mlvicx_dist.evaluate.embed import embed_shards
from mlvicx_dist.ingest.shards import index_path, read_manifest
from mlvicx_dist.model.encoder import Encoder
from mlvicx_dist.model.mlvicx import build_model
from mlvicx_dist.report.contact import contact_sheet
from mlvicx_dist.storage import place, read_bytes, read_range
from mlvicx_dist.stream import ahead as aheads
from mlvicx_dist.stream import cache as caches
from mlvicx_dist.stream import part as parts
from mlvicx_dist.stream import room as rooms
from mlvicx_dist.stream.ahead import coming
from mlvicx_dist.stream.cache import Cache, cache_of
from mlvicx_dist.stream.loader import Steps, batches
from mlvicx_dist.stream.shardset import ShardSet, _index

VIEWS = Views(image_size_px=24, blur_kernel_px=5)
SPLITS = ["train", "val", "test"]
BLOCK = 4096
FORK = multiprocessing.get_context("fork")


class Store(http.server.ThreadingHTTPServer):
    """A folder over http with ranges, which counts the bytes of shards and fails on command."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.served, self.ranges = defaultdict(int), []
        self.ranged, self.pause_s = True, 0.0
        self.refused = self.cut = self.spoilt = 0
        self.stalled, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()
        self._one = threading.Lock()

    def handle_error(self, request, client_address):
        pass

    def shard_bytes(self):
        return sum(count for name, count in self.served.items() if name.endswith(".tar"))

    def one_of(self, kind):
        """Whether this request is one of those that are to go wrong."""
        with self._one:
            left = getattr(self, kind)
            setattr(self, kind, max(left - 1, 0))
            return left > 0


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        store, name = self.server, self.path.strip("/")
        shard = name.endswith((".tar", ".npy"))
        if shard and store.one_of("refused"):
            self.send_error(503)
            return
        path = store.folder / name
        if not path.is_file():
            self.send_error(404)
            return
        data, wanted = path.read_bytes(), self.headers.get("Range")
        first, whole = 0, len(data)
        if wanted and store.ranged:
            first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
            data = data[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{whole}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if shard:
            store.ranges.append((name, first, len(data)))
            time.sleep(store.pause_s)
        if name.endswith(".tar"):
            if store.one_of("cut"):
                self.wfile.write(data[: len(data) // 2])
                return
            if store.one_of("spoilt"):
                data = bytes(len(data))
            if not store.go_on.is_set():
                self.wfile.write(data[: len(data) // 2])
                store.stalled.set()
                store.go_on.wait(30)
                data = data[len(data) // 2 :]
        store.served[name] += len(data)
        self.wfile.write(data)


class Clock:
    """Time for `storage` that passes only in its sleep."""

    def __init__(self):
        self.now_s, self.pauses_s = 0.0, []

    def monotonic(self):
        return self.now_s

    def sleep(self, pause_s):
        self.pauses_s.append(pause_s)
        self.now_s += pause_s


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Small shards of many blocks, and a process that has none of them open."""
    monkeypatch.setattr(parts, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(caches, "REQUEST_BYTES", 3 * BLOCK)
    forget()
    yield
    forget()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(storage, "time", clock)
    return clock


@pytest.fixture
def store(phantom_shards, tmp_path):
    folder = shutil.copytree(phantom_shards, tmp_path / "store")
    with Store(folder) as store:
        threading.Thread(target=store.serve_forever, daemon=True).start()
        yield store
        store.go_on.set()
        store.shutdown()


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


@pytest.fixture(scope="module")
def images(phantom_shards):
    return list(map(ShardSet.open([phantom_shards], splits=SPLITS).image, range(60)))


def forget():
    """As a later run: nothing is open and no warning was given."""
    caches._parts.clear()
    caches._warned.clear()
    _index.cache_clear()


def opened(store, cache):
    return ShardSet.open([store.url], splits=SPLITS, cache=cache)


def equal(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def same(first, second):
    return all(
        torch.equal(a.images, b.images) and torch.equal(a.samples, b.samples)
        for a, b in zip(first, second, strict=True)
    )


def read_to(shards, samples, barrier, path):
    barrier.wait()
    np.save(path, np.array([shards.image(sample).sum() for sample in samples]))


def upload(folder, url):
    for path in folder.iterdir():
        (place(url) / path.name).write_bytes(path.read_bytes())
    return url


def kept(cache, suffix):
    return sorted(path for path in cache.path().iterdir() if path.suffix == suffix)


def until(condition, *, seconds=20):
    end_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_s, "it did not come to that"
        time.sleep(0.01)


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
    known = shards.json(0)
    (part,) = kept(cache, ".part")
    with part.open("r+b") as file:
        file.write(bytes(shards.shards[0].info.bytes))
    forget()
    monkeypatch.setattr(parts, "_boot_s", lambda: time.time() + 60)
    assert shards.json(0) == known


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
    sheets = [contact_sheet([folder], VIEWS, count=4) for folder in (url, phantom_shards)]
    assert sheets[0].tobytes() == sheets[1].tobytes()
    folder = tmp_path / f"mlvicx-cache-{os.geteuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700


def test_the_shards_of_coming_steps_are_listed_soonest_first():
    orders = {0: np.array([[0, 1, 9], [5, 4, 2]]), 1: np.array([[8, 8, 8], [0, 5, 5]])}
    starts = np.array([0, 3, 6, 10])

    def listed(start, stop):
        return coming(orders.__getitem__, starts, steps_per_epoch=3, start=start, stop=stop)

    assert listed(0, 1) == [0, 1]
    assert listed(0, 3) == [0, 1, 2]
    assert listed(2, 3) == [2, 0]
    assert listed(2, 6) == [2, 0, 1]
    assert listed(3, 5) == [2, 0, 1]
    assert listed(5, 5) == []


def fetching():
    return [thread for thread in threading.enumerate() if thread.name == "mlvicx-ahead"]


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_are_fetched_before_their_steps_and_no_longer_than_the_run(
    store, cache, phantom_shards, workers
):
    shards = opened(store, cache)
    steps = Steps(shards, VIEWS, batch=2, seed=3)
    stop = steps.steps_per_epoch + 4
    stream = batches(steps, start=0, stop=stop, workers=workers)
    seen = [next(stream)]
    assert len(fetching()) == 1
    until(lambda: len(kept(cache, ".tar")) == len(shards.shards))
    # From here on there is no store, and the next epoch comes all the same.
    store.refused = 10**6
    assert store.shard_bytes() == sum(shard.info.bytes for shard in shards.shards)
    seen += list(stream)
    local = Steps(ShardSet.open([phantom_shards], splits=SPLITS), VIEWS, batch=2, seed=3)
    assert same(seen, list(batches(local, start=0, stop=stop, workers=0)))
    until(lambda: not fetching())


def test_fetching_ahead_keeps_its_distance_and_follows_the_run(store, cache, monkeypatch):
    monkeypatch.setattr(aheads, "AHEAD_STEPS", 3)
    steps = Steps(opened(store, cache), VIEWS, batch=2, seed=3)

    def near(step):
        numbers = coming(
            steps.order,
            steps.shards.starts,
            steps_per_epoch=steps.steps_per_epoch,
            start=step,
            stop=step + 3,
        )
        return {steps.shards.shards[number].info.sha256 for number in numbers}

    def there():
        return {path.name[:64] for path in kept(cache, ".tar")}

    stream = batches(steps, start=0, stop=30, workers=0)
    assert next(stream).step == 0
    until(lambda: near(0) <= there())
    assert there() == near(0)
    while next(stream).step < 12:
        pass
    assert not near(12) <= near(0)
    until(lambda: near(12) <= there())
    stream.close()


def test_an_iterator_that_is_closed_fetches_no_more(store, cache):
    steps = Steps(opened(store, cache), VIEWS, batch=2, seed=3)
    store.pause_s = 0.1
    stream = batches(steps, start=0, stop=20, workers=0)
    next(stream)
    assert len(fetching()) == 1
    stream.close()
    until(lambda: not fetching())
    assert len(kept(cache, ".tar")) < len(steps.shards.shards)


def test_local_shards_need_no_thread(phantom_shards):
    steps = Steps(ShardSet.open([phantom_shards], splits=SPLITS), VIEWS, batch=2, seed=3)
    stream = batches(steps, start=0, stop=20, workers=0)
    next(stream)
    assert fetching() == []


def test_fetching_ahead_leaves_room_for_what_was_read(store, cache):
    sizes = [parts.kept_bytes(info) for info in read_manifest(store.folder).shards]
    shards = opened(store, Cache(cache.folder, 4 * max(sizes)))
    steps = Steps(shards, VIEWS, batch=2, seed=3)
    stream = batches(steps, start=0, stop=20, workers=1)
    next(stream)
    until(lambda: len(kept(cache, ".tar")) >= 1)
    time.sleep(1)
    assert len(kept(cache, ".tar") + kept(cache, ".part")) <= 3
    stream.close()


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
