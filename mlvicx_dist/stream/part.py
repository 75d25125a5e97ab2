"""One remote shard in the cache folder: fetched block by block, checked when it is whole.

While some of it is missing its file holds its bytes, most of them a hole; then one byte a block,
which says whether the block is there; then one byte that counts how often the whole was wrong. When
all blocks are there the whole is held against its SHA-256, cut to its bytes and renamed. One file
says everything, so any step of this may be the last of its process.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mlvicx_dist.errors import DataError
from mlvicx_dist.ingest.shards import INDEX_DTYPE, ShardInfo
from mlvicx_dist.storage import Place, read_range
from mlvicx_dist.stream import room as rooms
from mlvicx_dist.stream.room import ACCOUNTS, Room

BLOCK_BYTES = 256 * 2**10
"""What is fetched at least."""
PLACES = 2**24
"""Of the lock file for each shard: one a block, and the last ones."""
FINISH, INDEX = PLACES - 2, PLACES - 1
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
THERE, WRONG_TWICE = 1, 2
HASHED_BYTES = 4 * 2**20


class Part:
    """A shard as this process has it open.

    Attributes:
        file: Its descriptor; None: it is not cached.
        whole: Whether all of it is there and as the manifest says.
        reason: Why some or all of it is not cached; empty where it is.
        used_s: When this process used it last, by the monotonic clock.

    Raises:
        DataError: the folder cannot be written.
    """

    def __init__(
        self, info: ShardInfo, there: Callable[[], Place], room: Room, limit: int, wanted: int
    ) -> None:
        self.info, self.there, self.room = info, there, room
        self.blocks = -(-info.bytes // BLOCK_BYTES)
        self.file: int | None = None
        self.whole, self.reason = False, ""
        self.used_s = self._touched_s = time.monotonic()
        self._slot = slot(info)
        self._final = room.path / f"{info.sha256}.tar"
        self._partial = room.path / f"{info.sha256}.part"
        try:
            with room.locks.hold(ACCOUNTS):
                room.make_folder()
                if not self._open(self._final) and not self._open(self._partial):
                    self._make(limit, wanted)
        except OSError as error:
            if error.errno not in FULL:
                raise room.unwritable(error) from None
            self._give_up(error)

    def __del__(self) -> None:
        if getattr(self, "file", None) is not None:
            os.close(self.file)  # type: ignore[arg-type]

    def fresh(self, now_s: float) -> bool:
        """Whether it is still that of the folder; now and then this keeps it from being removed."""
        if self.file is None:
            return now_s < self._touched_s + rooms.IN_USE_S
        if now_s > self._touched_s + rooms.IN_USE_S / 3:
            if os.fstat(self.file).st_nlink == 0:
                return False
            if not self._wrong():
                os.utime(self.file)
            self._touched_s = now_s
        return True

    def read(self, offset: int, size: int) -> bytes:
        """Bytes that are `ready`; fewer where the file was damaged."""
        return os.pread(self.file, size, offset) if self.file is not None else b""

    def ready(self, first: int, last: int, *, patience_s: float | None = None) -> bool:
        """Fetch what is missing of the bytes `first` … `last` - 1; False: they are not cached.

        Args:
            first: The first byte.
            last: The one after the last.
            patience_s: How long a store that fails is asked again; None: as `read_range` does.

        Raises:
            DataError: the store cannot give them, or twice gave what is not the manifest's.
        """
        wanted = range(first // BLOCK_BYTES, -(-last // BLOCK_BYTES))
        while self.file is not None and not self.whole:
            marks = self._marks()
            if len(marks) <= self.blocks:
                # Cut to its bytes: another process found it whole.
                self.whole = True
            elif self._wrong():
                raise DataError(
                    f"{self.there()}: its bytes in the store are not those of the manifest; run "
                    f"'mlvicx verify {self.there().parent}' for the damage and its repair."
                )
            elif _all_there(marks):
                if self.reason or not self._finish():
                    return True
            else:
                run = next(_missing(marks, wanted), None)
                if run is None:
                    return True
                if self.reason or not self._fetch(run, patience_s):
                    return False
        return self.whole

    def _open(self, path: Path) -> bool:
        """Open what there is, if it can be used; else it is removed."""
        try:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        stat = os.fstat(file)
        self.file, self.whole = file, stat.st_size == self.info.bytes
        if self.whole:
            if path == self._partial:
                self._partial.replace(self._final)
        # A machine that went down may have kept the marks and lost the blocks.
        elif (
            path == self._final
            or stat.st_size != self.info.bytes + self.blocks + 1
            or stat.st_mtime < _boot_s()
            or (self._wrong() and stat.st_mtime < time.time() - rooms.IN_USE_S)
        ):
            self.file = None
            os.close(file)
            path.unlink()
            return False
        if not self._wrong():
            os.utime(file)
        return True

    def _make(self, limit: int, wanted: int) -> None:
        short = self.room.make(self.info.sha256, kept_bytes(self.info), limit)
        if short:
            self.reason = (
                f"{self.room.path}: data.cache_gb = {limit / 1e9:g} is too little for the shards "
                "in use at once, so some are read from the store each time; "
                f"{_gigabytes(max(short, wanted))} would hold all."
            )
            return
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self.file = os.open(self._partial, flags, 0o600)
        os.ftruncate(self.file, self.info.bytes + self.blocks + 1)

    def _is_at(self, path: Path) -> bool:
        assert self.file is not None
        try:
            return os.path.samestat(path.stat(), os.fstat(self.file))
        except FileNotFoundError:
            return False

    def _marks(self) -> bytes:
        assert self.file is not None
        return os.pread(self.file, self.blocks + 1, self.info.bytes)

    def _wrong(self) -> bool:
        return not self.whole and self._marks()[-1:] == bytes([WRONG_TWICE])

    def _fetch(self, run: range, patience_s: float | None) -> bool:
        """Fetch blocks that are missing, unless someone else just did; False: they cannot be kept.

        Raises:
            DataError: the store cannot give them.
        """
        with self.room.locks.hold(self._slot + run.start, len(run)):
            for part in _missing(self._marks(), run):
                first = part.start * BLOCK_BYTES
                size = min(part.stop * BLOCK_BYTES, self.info.bytes) - first
                data = read_range(self.there(), first, size, patience_s=patience_s)
                try:
                    self._write(data, first)
                    self._write(bytes([THERE]) * len(part), self.info.bytes + part.start)
                except OSError as error:
                    self._give_up(error)
                    return False
        return True

    def _finish(self) -> bool:
        """Check a shard whose blocks are all there; False: another process does, or it cannot be.

        What is wrong loses its marks once: perhaps it went wrong on the way.
        """
        with self.room.locks.hold(self._slot + FINISH, wait=False) as held:
            marks = self._marks()
            if not held:
                return False
            if not _all_there(marks):
                return True
            assert self.file is not None
            try:
                if self._sha256() != self.info.sha256:
                    self._write(bytes(self.blocks) + bytes([marks[-1] + 1]), self.info.bytes)
                    return True
                os.fsync(self.file)
                os.ftruncate(self.file, self.info.bytes)
                with self.room.locks.hold(ACCOUNTS):
                    # It may have been removed, and another one begun in its place.
                    if self._is_at(self._partial):
                        self._partial.replace(self._final)
            except OSError as error:
                self._give_up(error)
                return False
        return True

    def _sha256(self) -> str:
        assert self.file is not None
        digest = hashlib.sha256()
        for offset in range(0, self.info.bytes, HASHED_BYTES):
            size = min(HASHED_BYTES, self.info.bytes - offset)
            digest.update(os.pread(self.file, size, offset))
        return digest.hexdigest()

    def _write(self, data: bytes, offset: int) -> None:
        assert self.file is not None
        view = memoryview(data)
        while view:
            written = os.pwrite(self.file, view, offset)
            view, offset = view[written:], offset + written

    def _give_up(self, error: OSError) -> None:
        """Keep no more of it than is there."""
        self.reason = (
            f"{self.room.path}: no more of the shards can be kept ({error.strerror}), so some are "
            "read from the store each time; make room there or set data.cache_dir to another disk."
        )


def kept_bytes(info: ShardInfo) -> int:
    """What a shard, its block map and its index take of a cache, at most."""
    index_bytes = 256 + info.samples * INDEX_DTYPE.itemsize
    return info.bytes + info.bytes // BLOCK_BYTES + 2 + index_bytes


def slot(info: ShardInfo) -> int:
    """The first of the places of the lock file that a shard has."""
    return int(info.sha256[:8], 16) * PLACES


def _missing(marks: bytes, wanted: range) -> Iterator[range]:
    """The runs of blocks of `wanted` that are not there; none in a file cut to its bytes."""
    blocks = [block for block in wanted if block < len(marks) and marks[block] != THERE]
    for _, run in itertools.groupby(enumerate(blocks), lambda pair: pair[1] - pair[0]):
        found = [block for _, block in run]
        yield range(found[0], found[-1] + 1)


def _all_there(marks: bytes) -> bool:
    return len(marks) > 0 and marks.count(THERE, 0, len(marks) - 1) == len(marks) - 1


def _boot_s() -> float:
    """When this machine was started, in the time of files."""
    return time.time() - time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _gigabytes(count: int) -> str:
    return f"{math.ceil(count / 10**7) / 100:g} GB"
