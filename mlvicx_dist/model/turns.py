"""Forwards by turns on one thread: what one of them waits for travels while another computes.

Both views pass one encoder, and each of its batch norms waits for the other ranks. By turns view 2
computes a layer while the sums of view 1's travel, and the other way round. Autograd runs backward
by the order in which forward made its nodes, newest first, so backward goes by turns too. No number
changes: each view's operations are the same, and view 1 is first at every norm.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TypeVar

from greenlet import getcurrent, greenlet

T = TypeVar("T")
R = TypeVar("R")


class _Turn(greenlet):
    """One of the calls; its parent is who deals out the turns."""


def by_turns(call: Callable[[T], R], *inputs: T) -> list[R]:
    """What `call` makes of each input; where one rests, the next one goes on.

    An exception of one ends all of them.
    """
    turns = [_Turn(call) for _ in inputs]
    answers = [turn.switch(x) for turn, x in zip(turns, inputs, strict=True)]
    waiting = deque(k for k, turn in enumerate(turns) if not turn.dead)
    while waiting:
        k = waiting.popleft()
        answers[k] = turns[k].switch()
        if not turns[k].dead:
            waiting.append(k)
    return answers


def rest() -> None:
    """Let the other calls of `by_turns` go on first; outside of it nothing."""
    here = getcurrent()
    if isinstance(here, _Turn):
        here.parent.switch()
