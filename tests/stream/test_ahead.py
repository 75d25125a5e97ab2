"""Shards that are fetched before their steps."""

import threading
import time

import numpy as np
import pytest
from web import SPLITS, VIEWS, kept, opened, same, until

from mlvicx_dist.ingest.shards import read_manifest
from mlvicx_dist.stream import ahead as aheads
from mlvicx_dist.stream import part as parts
from mlvicx_dist.stream.ahead import coming
from mlvicx_dist.stream.cache import Cache
from mlvicx_dist.stream.loader import Steps, batches
from mlvicx_dist.stream.shardset import ShardSet


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
