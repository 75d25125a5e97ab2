"""Between a driver and its workers: a Ray actor on the driver's node that dies with the driver.

It carries the driver's word to rank 0 and rank 0's rows to the driver, and by its name a run has
one driver. It is one process: each of Ray's, of which a run has ten, wakes 100 times a second.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray

from mlvicx_dist.session import WATCHER, on_this_node
from mlvicx_dist.train.notices import Notice
from mlvicx_dist.train.owner import taken
from mlvicx_dist.train.rows import append

NAMESPACE = "mlvicx"
LOOK_EVERY_S = 3.0
"""How often the workers ask Ray together for preemption notices: a call of some milliseconds."""


class _Guard:
    """Holds a run's name in the cluster; carries words to rank 0 and its rows into a file."""

    def __init__(self, channel: Path | None) -> None:
        self._channel, self._lines = channel, ""
        self._word = Notice.NONE
        self._told = asyncio.Event()

    async def tell(self, word: int) -> None:
        self._word = Notice(word)
        self._told.set()

    async def told(self) -> int:
        """The next word; waits for it."""
        await self._told.wait()
        if self._word is not Notice.STOP:
            self._told.clear()
        return int(self._word)

    async def write(self, lines: str) -> None:
        """Add lines to the file; where that cannot be they wait for the next ones."""
        assert self._channel is not None
        self._lines += lines
        with suppress(OSError):
            append(self._channel, self._lines)
            self._lines = ""


def unnamed_guard(channel: Path | None, **options: Any) -> Any:
    """A guard of no run: rows go into the file `channel` of this process's node."""
    return ray.remote(_Guard).options(**on_this_node(), **options).remote(channel)


def guard(
    run_dir: str, kind: str = "run", key: str = "run.name", *, channel: Path | None = None
) -> Any:
    """The guard of a run or a sweep, held by this process; it ends with it.

    Args:
        run_dir: The folder that one driver is to write.
        kind: What it is, for the sentence that refuses another driver.
        key: The setting that names it.
        channel: The file for rows.

    Raises:
        ResourceError: another driver of the cluster holds it.
    """
    name = "run-" + hashlib.sha256(run_dir.encode()).hexdigest()[:16]
    try:
        return unnamed_guard(channel, name=name, namespace=NAMESPACE)
    except ValueError:
        raise taken(run_dir, kind, key) from None


class FromRay:
    """Notices of a Ray Train worker: the driver's word, and Ray's of nodes that are taken away."""

    def __init__(self, held: Any, *, rank: int) -> None:
        self._guard = held
        self._answer = held.told.remote() if rank == 0 else None
        self._looked_s = time.monotonic()
        self._looks = os.environ.get(WATCHER) != "0"

    def word(self) -> Notice:
        """What the driver said, or now and then LOOK."""
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            word = Notice(ray.get(self._answer))
            self._answer = self._guard.told.remote() if word is not Notice.STOP else None
            return word
        now = time.monotonic()
        if not self._looks or now - self._looked_s < LOOK_EVERY_S:
            return Notice.NONE
        self._looked_s = now
        return Notice.LOOK

    def leaving(self) -> bool:
        """Whether Ray says that a node of the group is about to go."""
        import ray.train

        return ray.train.get_preemption_info() is not None
