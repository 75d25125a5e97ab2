"""A store of shards on loopback, its cache, and a clock without waiting."""

import shutil
import threading

import pytest
from web import BLOCK, SPLITS, Clock, Store, forget

from mlvicx_dist import storage
from mlvicx_dist.stream import cache as caches
from mlvicx_dist.stream import part as parts
from mlvicx_dist.stream.cache import Cache
from mlvicx_dist.stream.shardset import ShardSet


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
