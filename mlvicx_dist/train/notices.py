"""What a group of workers must hear at the same step: stop, or leave so that another group starts.

Rank 0 listens and gives its word at every step; all ranks hear it one step later, so that nobody
ever waits for it. Then rank 0 saves, and no worker leaves before the checkpoint is whole.
"""

from __future__ import annotations

from datetime import timedelta
from enum import IntEnum
from typing import Any, Protocol

import torch
import torch.distributed as dist


class Notice(IntEnum):
    """A word to the workers."""

    NONE = 0
    LOOK = 1
    """Ask together whether a node is about to be taken away."""
    REGROUP = 2
    """Save and leave: a group of another size goes on."""
    STOP = 3
    """Save and end: the same command goes on another time."""


class Regroup(Exception):  # noqa: N818  (no error: the way in which a whole group leaves)
    """Every worker leaves, after a checkpoint if that could be; the next group goes on from it."""

    def __init__(self, step: int, saved: bool) -> None:
        super().__init__(step, saved)
        self.step, self.saved = step, saved

    def __str__(self) -> str:
        how = "saved and start" if self.saved else "could not save, and start"
        return f"a node leaves or comes: at step {self.step} the workers {how} anew"


class Notices(Protocol):
    """Where notices come from."""

    def word(self) -> Notice:
        """Rank 0's word at a step; must not wait."""

    def leaving(self) -> bool:
        """Whether a node of the group is about to be taken away; all ranks ask together."""


class NoNotices:
    """Nobody ever says anything."""

    def word(self) -> Notice:
        """Nothing."""
        return Notice.NONE

    def leaving(self) -> bool:
        """No."""
        return False


class Agreement:
    """Rank 0's word, heard by every rank at the same step, one step after it was given."""

    def __init__(self, rank: int, world_size: int, *, timeout_s: float) -> None:
        self.rank, self.world_size = rank, world_size
        self._said = torch.zeros(1, dtype=torch.int64)
        self._underway: Any = None
        # A group of its own, on the CPU: its messages pass beside those of the gradients.
        self._group: Any = (
            dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
            if world_size > 1
            else None
        )

    def heard(self, notices: Notices) -> Notice:
        """Give this step's word and hear the last one; REGROUP and STOP mean to leave now."""
        if self.world_size == 1:
            word = notices.word()
        else:
            word = self._last_word()
            self._said = torch.tensor([int(notices.word()) if self.rank == 0 else 0])
            self._underway = dist.broadcast(self._said, 0, group=self._group, async_op=True)
        if word is Notice.LOOK:
            return Notice.REGROUP if notices.leaving() else Notice.NONE
        return word

    def _last_word(self) -> Notice:
        if self._underway is None:
            return Notice.NONE
        self._underway.wait()
        return Notice(int(self._said))

    def together(self) -> None:
        """Wait until every rank is here."""
        if self._underway is not None:
            self._underway.wait()
        if self._group is not None:
            dist.barrier(self._group)
