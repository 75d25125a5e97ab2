"""Remote shards, read through a folder that all processes of a node share and later runs find.

A byte is downloaded once a node, while it fits; a shard is kept under its SHA-256.
"""

from __future__ import annotations

import logging
import os
import resource
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from mlvicx_dist import storage
from mlvicx_dist.config import Cached
from mlvicx_dist.errors import DataError
from mlvicx_dist.ingest.shards import ShardInfo, index_path, parse_index
from mlvicx_dist.storage import Place, place, read_bytes, read_range, told, write_whole
from mlvicx_dist.stream import room as rooms
from mlvicx_dist.stream.part import INDEX, Part, slot
from mlvicx_dist.stream.room import room_at

log = logging.getLogger(__name__)

OPEN_SHARDS = max(256, min(1024, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
"""Shards that a process keeps open: a step reads one for each lane of its rank, in the same round
each time, so that of fewer none would be open still when it is asked for."""
REQUEST_BYTES = 8 * 2**20
"""What is fetched at a time of a shard that is fetched whole."""


@dataclass(frozen=True)
class Cache:
    """Where a node keeps remote shards, and how much of them.

    Attributes:
        folder: None: `mlvicx-cache-<uid>` in the temp dir.
        limit_bytes: What it holds at most.
        wanted_bytes: What would hold all shards of the set; `ShardSet.open` fills it in.
    """

    folder: Path | None = None
    limit_bytes: int = 50 * 10**9
    wanted_bytes: int = 0

    def path(self) -> Path:
        """The folder on the machine that asks."""
        return self.folder or Path(tempfile.gettempdir()) / f"mlvicx-cache-{os.geteuid()}"


def cache_of(data: Cached) -> Cache:
    """The cache that the settings ask for."""
    folder = Path(data.cache_dir).expanduser().absolute() if data.cache_dir else None
    return Cache(folder, int(data.cache_gb * 10**9))


@dataclass(frozen=True)
class RemoteShard:
    """A shard in a store and the cache that it is read through: plain values, cheap to pickle."""

    folder: str
    info: ShardInfo
    cache: Cache

    def __str__(self) -> str:
        return f"{self.folder.rstrip('/')}/{self.info.name}"

    def there(self) -> Place:
        """Where it is, for this process alone: the libraries of stores do not survive a fork."""
        return _place(str(self), os.getpid())

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the shard; what is missing of them in the cache is fetched and kept there.

        Raises:
            DataError: the store cannot give them, or gives other bytes than the manifest's.
        """
        part = _part(self)
        if part.ready(offset, offset + size):
            data = part.read(offset, size)
            if len(data) == size:
                return data
        _warn(part.reason)
        return read_range(self.there(), offset, size)

    def is_kept(self) -> bool:
        """Whether all of it is in the cache; asking keeps it there for a while."""
        return _part(self).whole

    def fill(
        self, going_on: Callable[[], bool] = lambda: True, *, patience_s: float | None = None
    ) -> bool:
        """Fetch all that is missing of it, while `going_on`; whether it is there, and as it was.

        Raises:
            DataError: as `read` does.
        """
        part = _part(self)
        # What was wrong as a whole has lost its blocks and is fetched once more.
        for first in [*range(0, self.info.bytes, REQUEST_BYTES)] * 2:
            last = min(first + REQUEST_BYTES, self.info.bytes)
            if not going_on() or not part.ready(first, last, patience_s=patience_s):
                break
            if part.whole:
                break
        return part.whole

    def index(self, *, patience_s: float | None = None) -> np.ndarray:
        """Its index, `INDEX_DTYPE` [samples], downloaded once a node.

        Args:
            patience_s: How long a store that fails is asked again; None: as `read_range` does.

        Raises:
            DataError: it is missing or damaged, or the store cannot give it.
        """
        room = room_at(self.cache.path())
        path, remote = room.path / f"{self.info.sha256}.index.npy", index_path(self.there())
        patience_s = storage.PATIENCE_S if patience_s is None else patience_s
        with room.locks.hold(slot(self.info) + INDEX):
            index = _kept(path, self.info)
            for _ in range(2):
                if index is not None:
                    return index
                try:
                    data = read_bytes(remote, patience_s=patience_s)
                except FileNotFoundError:
                    break
                except OSError as error:
                    raise DataError(
                        f"{remote}: it could not be read for {patience_s:.0f} s ({told(error)}); "
                        "check the store and the network, then run the same command again."
                    ) from None
                index = parse_index(data, self.info)
                if index is not None:
                    _keep(path, data)
        if index is None:
            raise DataError(
                f"{remote}: the index is missing or damaged; run 'mlvicx verify {self.folder}' for "
                "its repair."
            )
        return index


def _kept(path: Path, info: ShardInfo) -> np.ndarray | None:
    try:
        return parse_index(path.read_bytes(), info)
    except OSError:
        return None


def _keep(path: Path, data: bytes) -> None:
    try:
        write_whole(path, data, mode=0o600)
    except OSError:
        # A disk that is full holds no shards either, and that is said there.
        path.unlink(missing_ok=True)


_parts: dict[tuple[Path, str], Part] = {}
_table = threading.Lock()
_warned: set[bool] = set()


def _part(shard: RemoteShard) -> Part:
    """The shard as this process has it open."""
    room, cache, now_s = room_at(shard.cache.path()), shard.cache, time.monotonic()
    key = (room.path, shard.info.sha256)
    with _table:
        part = _parts.get(key)
        if part is not None and part.fresh(now_s):
            part.used_s = now_s
            return part
    part = Part(shard.info, shard.there, room, cache.limit_bytes, cache.wanted_bytes)
    with _table:
        _parts[key] = part
        # A shard that was removed takes its room for as long as someone has it open.
        last = sorted(_parts, key=lambda key: _parts[key].used_s)
        for number, old in enumerate(last[:-1]):
            idle = _parts[old].used_s < now_s - rooms.IN_USE_S
            if idle or number < len(last) - OPEN_SHARDS:
                del _parts[old]
    return part


def _warn(reason: str) -> None:
    """Say once a process why shards are not cached."""
    too_small = "data.cache_gb" in reason
    if reason and too_small not in _warned:
        _warned.add(too_small)
        log.warning("%s", reason)


@lru_cache(maxsize=4096)
def _place(url: str, process: int) -> Place:
    return place(url)


def _forget() -> None:
    """A child opens for itself."""
    global _table
    _table = threading.Lock()
    _parts.clear()


os.register_at_fork(after_in_child=_forget)
