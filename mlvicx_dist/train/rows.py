"""How rank 0's rows reach the driver: the run's guard writes them into a file on its node.

They do not pass through `ray.train.report`: Ray Train's controller takes one of them each time it
looks whether the workers live, and a worker with another one to report would wait for that.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
POLL_S = 0.2
LAST_WORD_S = 5.0
"""How long a worker that ends waits for its last row to be written."""


@contextmanager
def telling(guard: Any, rank: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What a worker calls with its rows in the block, in any thread; rank 0's reach the driver.

    Nobody waits for that.

    A row that comes while the one before is under way goes with the next, so that they stay in
    order: Ray does not promise that of the calls of such an actor.

    Args:
        guard: The group's.
        rank: This worker's.
    """
    import ray

    sent: list[Any] = []
    lines: list[str] = []
    turn = threading.Lock()

    def send() -> None:
        sent[:] = [guard.write.remote("".join(lines))]
        lines.clear()

    def tell(row: dict[str, Any]) -> None:
        if rank == 0:
            with turn:
                lines.append(json.dumps(row) + "\n")
                if not sent or ray.wait(sent, timeout=0)[0]:
                    send()

    try:
        yield tell
    finally:
        if sent:
            ray.wait(sent, timeout=LAST_WORD_S)
        if lines:
            send()
            ray.wait(sent, timeout=LAST_WORD_S)


def append(channel: Path, lines: str) -> None:
    """Add whole lines to the file."""
    with channel.open("a", encoding="utf-8") as file:
        # A disk that was full may have cut the line before.
        file.write("\n" + lines)


def _attempt(work: Callable[[], T], raised: list[Exception]) -> T | None:
    """What it gives; or None, and `raised` has what was raised first."""
    try:
        return work()
    except Exception as error:
        raised[:] = raised or [error]
        return None


class Reader:
    """The rows that came into a file since the last look; a line that is not whole is none yet."""

    def __init__(self, channel: Path) -> None:
        self._channel, self._read = channel, 0

    def __call__(self) -> list[dict[str, Any]]:
        """Look."""
        with self._channel.open("rb") as file:
            file.seek(self._read)
            lines, end, _ = file.read().rpartition(b"\n")
        self._read += len(lines) + len(end)
        rows = []
        for line in lines.splitlines():
            with suppress(ValueError):
                rows.append(json.loads(line))
        return rows


@contextmanager
def watching(channel: Path, show: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Call `show`, in a thread, with each row that comes through the channel in the block.

    Raises:
        Exception: what `show` raised first, when the block ends; later rows were shown too.
    """
    channel.touch()
    look, ended = Reader(channel), threading.Event()
    raised: list[Exception] = []

    def follow() -> None:
        last_look = False
        while not last_look:
            last_look = ended.wait(POLL_S)
            for row in _attempt(look, raised) or ():
                _attempt(partial(show, row), raised)

    thread = threading.Thread(target=follow, name="mlvicx-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    if raised:
        raise raised[0]
