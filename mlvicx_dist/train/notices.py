"""What a group of workers may be told: stop, or leave so that another group starts.

Without PyTorch, so that who only tells it stays a small process; `agreement` is the workers' side.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Protocol


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
