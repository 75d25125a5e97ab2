"""How rank 0's rows reach the driver: the run's guard writes them into a file on its node.

They do not pass through `ray.train.report`: Ray Train's controller takes one of them each time it
looks whether the workers live, and a worker with another one to report would wait for that.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

POLL_S = 0.2
LAST_WORD_S = 5.0
"""How long a worker that ends waits for its last row to be written."""


@contextmanager
def telling(held: Any, rank: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What a worker calls with its rows in the block; rank 0's reach the driver, without a wait.

    Args:
        held: The `guard`.
        rank: This worker's.
    """
    import ray

    last: list[Any] = []

    def tell(row: dict[str, Any]) -> None:
        if rank == 0:
            last[:] = [held.write.remote(json.dumps(row))]

    try:
        yield tell
    finally:
        if last:
            ray.wait(last, timeout=LAST_WORD_S)


def append(channel: Path, line: str) -> None:
    """Add a line to the file."""
    with channel.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


@contextmanager
def watching(channel: Path, show: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Call `show`, in a thread, with each row that comes through the channel in the block.

    Raises:
        Exception: what `show` raised, when the block ends; no row after that one was shown.
    """
    channel.touch()
    ended = threading.Event()
    raised: list[Exception] = []

    def follow() -> None:
        with channel.open(encoding="utf-8") as file:
            line = ""
            while True:
                last_look = ended.is_set()
                while piece := file.readline():
                    line += piece
                    if line.endswith("\n"):
                        try:
                            show(json.loads(line))
                        except Exception as error:
                            raised.append(error)
                            return
                        line = ""
                if last_look:
                    return
                ended.wait(POLL_S)

    thread = threading.Thread(target=follow, name="mlvicx-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    if raised:
        raise raised[0]
