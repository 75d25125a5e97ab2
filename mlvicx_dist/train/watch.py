"""What the driver sees of a run: rows that the workers report, by way of Ray Train's controller.

The controller runs on the driver's node, so a file there carries the rows: no actor, no port.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ray.train import UserCallback

from mlvicx_dist.errors import TrainingError, UserError
from mlvicx_dist.train.notices import Regroup

E = TypeVar("E", bound=BaseException)
POLL_S = 0.2


class Forward(UserCallback):
    """Runs in the controller: hands rank 0's rows on, counts failures, stops at a user's error.

    A user's error would only come again: raising it here ends the run at once, where Ray would
    start the workers once more.
    """

    def __init__(self, channel: Path, max_failures: int, *, resumes: bool = True) -> None:
        self.channel, self.max_failures, self.resumes = channel, max_failures, resumes
        self._failures, self._step, self._best = 0, 0, -1
        self._nodes: list[str] = []

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        """Append rank 0's row to the channel; where it is a group's first, with all its nodes."""
        self._step = max(self._step, int(metrics[0]["step"]))
        row = metrics[0]
        if "node" in row:
            self._nodes = [str(one["node"]) for one in metrics]
            row = {**row, "nodes": self._nodes}
        self._put(row)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Say that workers died; raise a user's error, or that they died too often.

        Raises:
            UserError: what a worker raised, or more than `max_failures` in a row none of which
                came further than the one before.
        """
        for error in worker_exceptions.values():
            cause = user_error(error)
            if cause:
                raise cause
        left = [inside(error, Regroup) for error in worker_exceptions.values()]
        regroups = sorted((one for one in left if one), key=lambda one: one.saved)
        if regroups:
            self._say(str(regroups[0]))
            return
        ranks = ", ".join(
            f"{rank} on {self._nodes[rank]}" if rank < len(self._nodes) else str(rank)
            for rank in sorted(worker_exceptions)
        )
        words = str(next(iter(worker_exceptions.values()))).strip().splitlines()
        last = words[-1][:200] if words else "no message"
        self._failures = self._failures + 1 if self._step <= self._best else 1
        self._best = self._step
        if self._failures > self.max_failures:
            later = ", which goes on from the newest checkpoint" if self.resumes else ""
            raise TrainingError(
                f"step {self._step}: the workers failed {self._failures} times without a step "
                f"further, the last time with: {last}; mend that and run the same command again"
                f"{later}, or raise workers.max_failures."
            )
        now = "going on from the newest checkpoint" if self.resumes else "beginning anew"
        self._say(f"worker {ranks} died ({last}); {now}")

    def _say(self, words: str) -> None:
        self._put({"said": [words]})

    def _put(self, row: dict[str, Any]) -> None:
        with self.channel.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def user_error(error: BaseException | None) -> UserError | None:
    """The user's error inside Ray's wrappers, where there is one."""
    return inside(error, UserError)


def inside(error: BaseException | None, kind: type[E]) -> E | None:
    """The error of a kind inside Ray's wrappers, where there is one."""
    seen: set[int] = set()
    queue = [error]
    while queue:
        current = queue.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, kind):
            return current
        inner = [
            getattr(current, name, None) for name in ("controller_failure", "_base_exc", "cause")
        ]
        inner += [*getattr(current, "worker_failures", {}).values()]
        queue += [e for e in (*inner, current.__cause__) if isinstance(e, BaseException)]
    return None


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
