"""How the workers of a group hear a notice at the same step.

Rank 0 listens and gives its word at every step; all ranks hear it one step later, so that nobody
ever waits for it. Then rank 0 saves, and no worker leaves before the checkpoint is whole.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mlvicx_dist.train.notices import Notice, Notices


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

    def heard(self, notices: Notices, *, stay: bool = False) -> Notice:
        """Give this step's word and hear the last one; REGROUP and STOP mean to leave now.

        With `stay` rank 0 does not pass on that the group may grow: it could not save.
        """
        own = notices.word() if self.rank == 0 else Notice.NONE
        if stay and own is Notice.REGROUP:
            own = Notice.NONE
        if self.world_size == 1:
            word = own
        else:
            word = self._last_word()
            self._said = torch.tensor([int(own)])
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
