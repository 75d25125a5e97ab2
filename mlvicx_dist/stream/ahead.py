"""Fetching ahead: since the order is known, remote shards are on the disk before they are read."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np

from mlvicx_dist.errors import UserError
from mlvicx_dist.stream import room as rooms
from mlvicx_dist.stream.cache import RemoteShard
from mlvicx_dist.stream.part import kept_bytes
from mlvicx_dist.stream.shardset import ShardSet

log = logging.getLogger(__name__)

AHEAD_STEPS = 256
"""How many steps ahead shards are fetched."""
AHEAD_SHARE = 0.5
"""Of the cache, what the ranks of a node fetch ahead; the rest is for what was just read."""
IDLE_S = 0.5


def coming(
    order: Callable[[int], np.ndarray],
    starts: np.ndarray,
    *,
    steps_per_epoch: int,
    start: int,
    stop: int,
) -> list[int]:
    """The shards that the steps `start` … `stop` - 1 read, soonest first, each once.

    Args:
        order: The samples of an epoch, int64 [lanes, steps_per_epoch].
        starts: The first sample of each shard and the number of all, int64 [shards + 1].
        steps_per_epoch: Steps of an epoch.
        start: A step of the run.
        stop: The one after the last.
    """
    samples = []
    while start < stop:
        epoch, column = divmod(start, steps_per_epoch)
        count = min(stop - start, steps_per_epoch - column)
        samples.append(order(epoch)[:, column : column + count].T.ravel())
        start += count
    if not samples:
        return []
    needed = np.searchsorted(starts, np.concatenate(samples), side="right") - 1
    shards, first = np.unique(needed, return_index=True)
    return [int(shard) for shard in shards[np.argsort(first)]]


class Ahead:
    """A thread that fetches what a rank comes to, from `with` to its end; errors are the reader's.

    Where nothing is remote there is no thread.
    """

    def __init__(
        self,
        order: Callable[[int], np.ndarray],
        shards: ShardSet,
        *,
        steps_per_epoch: int,
        start: int,
        stop: int,
        world_size: int,
    ) -> None:
        # Around the end of an epoch it takes turns with the next.
        self._order = lru_cache(maxsize=2)(order)
        self._shards, self._steps_per_epoch = shards, steps_per_epoch
        self._step, self._stop = start, stop
        # Ray Train says how many ranks share the node.
        self._ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        self._over = threading.Event()
        self._not_before_s: dict[int, float] = {}
        self._pause_s: dict[int, float] = {}
        self.thread: threading.Thread | None = None

    def __enter__(self) -> Ahead:
        if any(isinstance(shard, RemoteShard) for shard in self._shards.shards):
            self.thread = threading.Thread(target=self._run, name="mlvicx-ahead", daemon=True)
            self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        # It ends after the request that it is in; nobody waits for that.
        self._over.set()

    def reached(self, step: int) -> None:
        """The run has come to this step."""
        self._step = step

    def _run(self) -> None:
        while not self._over.is_set() and self._step < self._stop:
            try:
                fetched = self._pass()
            except Exception:
                # It saves time and decides nothing, so it takes nobody down with it.
                log.debug("fetching ahead stopped", exc_info=True)
                return
            if not fetched:
                self._over.wait(IDLE_S)

    def _pass(self) -> bool:
        """Fetch the first shard to come that is not there; whether one was fetched."""
        for number, shard in self._window():
            if self._over.is_set():
                return False
            if time.monotonic() < self._not_before_s.get(number, 0) or shard.is_kept():
                continue
            try:
                # Asked once: who waits for a block of it is not kept waiting by patience.
                shard.index(patience_s=0)
                if shard.fill(lambda: not self._over.is_set(), patience_s=0):
                    return True
            except UserError as error:
                log.debug("fetching ahead: %s", error)
            pause_s = self._pause_s.get(number, rooms.IN_USE_S)
            self._not_before_s[number] = time.monotonic() + pause_s
            self._pause_s[number] = 2 * pause_s
            return False
        return False

    def _window(self) -> Iterator[tuple[int, RemoteShard]]:
        """The remote shards to come, by number, as far as steps and room go."""
        step = self._step
        numbers = coming(
            self._order,
            self._shards.starts,
            steps_per_epoch=self._steps_per_epoch,
            start=step,
            stop=min(step + AHEAD_STEPS, self._stop),
        )
        taken = 0
        for number in numbers:
            shard = self._shards.shards[number]
            if isinstance(shard, RemoteShard):
                taken += kept_bytes(shard.info)
                if taken > AHEAD_SHARE * shard.cache.limit_bytes / self._ranks:
                    return
                yield number, shard
