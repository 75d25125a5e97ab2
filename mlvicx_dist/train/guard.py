"""One driver a run, and its word to the workers: a named Ray actor that dies with the driver."""

from __future__ import annotations

import asyncio
import hashlib
import time
from typing import Any

import ray
import ray.train
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mlvicx_dist.train.notices import Notice
from mlvicx_dist.train.owner import taken

NAMESPACE = "mlvicx"
LOOK_EVERY_S = 3.0
"""How often the workers ask Ray together for preemption notices: a call of some milliseconds."""


class _Guard:
    """Holds the run's name in the cluster; carries words from the driver to rank 0."""

    def __init__(self) -> None:
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


def guard(run_dir: str, kind: str = "run", key: str = "run.name") -> Any:
    """The guard of a run or a sweep, held by this process; it ends with it.

    Raises:
        ResourceError: another driver of the cluster holds it.
    """
    name = "run-" + hashlib.sha256(run_dir.encode()).hexdigest()[:16]
    # On the driver's node: it must not go with a node that is taken away, nor keep one busy.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {
        "name": name,
        "namespace": NAMESPACE,
        "num_cpus": 0,
        "scheduling_strategy": here,
    }
    try:
        return ray.remote(_Guard).options(**options).remote()
    except ValueError:
        raise taken(run_dir, kind, key) from None


class FromRay:
    """Notices of a Ray Train worker: the driver's word, and Ray's of nodes that are taken away."""

    def __init__(self, held: Any, *, rank: int) -> None:
        self._guard = held
        self._answer = held.told.remote() if rank == 0 else None
        self._looked_s = time.monotonic()

    def word(self) -> Notice:
        """What the driver said, or now and then LOOK."""
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            word = Notice(ray.get(self._answer))
            self._answer = self._guard.told.remote() if word is not Notice.STOP else None
            return word
        now = time.monotonic()
        if now - self._looked_s < LOOK_EVERY_S:
            return Notice.NONE
        self._looked_s = now
        return Notice.LOOK

    def leaving(self) -> bool:
        """Whether Ray says that a node of the group is about to go."""
        return ray.train.get_preemption_info() is not None
