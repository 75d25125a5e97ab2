"""What becomes of a group of which a worker fails: Ray Train's controller asks here.

The controller runs on the driver's node, so it reads the rows that were told, and adds its own.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from ray.train import UserCallback

from mlvicx_dist.errors import TrainingError, UserError, last_line
from mlvicx_dist.train.notices import Regroup
from mlvicx_dist.train.rows import Reader, append

E = TypeVar("E", bound=BaseException)


class Failures(UserCallback):
    """Runs in the controller: counts failures in a row and tells them, stops at a user's error.

    A user's error would only come again: raising it here ends the run at once, where Ray would
    start the workers once more.
    """

    def __init__(self, channel: Path, max_failures: int, *, resumes: bool = True) -> None:
        self.channel, self.max_failures, self.resumes = channel, max_failures, resumes
        self._rows = Reader(channel)
        self._failures, self._step, self._best = 0, 0, -1
        self._nodes: list[str] = []

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
        self._look()
        step, nodes = self._step, self._nodes
        ranks = ", ".join(
            f"{rank} on {nodes[rank]}" if rank < len(nodes) else str(rank)
            for rank in sorted(worker_exceptions)
        )
        last = last_line(next(iter(worker_exceptions.values())))[:200]
        self._failures = self._failures + 1 if step <= self._best else 1
        self._best = step
        if self._failures > self.max_failures:
            later = ", which goes on from the newest checkpoint" if self.resumes else ""
            raise TrainingError(
                f"step {step}: the workers failed {self._failures} times without a step "
                f"further, the last time with: {last}; mend that and run the same command again"
                f"{later}, or raise workers.max_failures."
            )
        now = "going on from the newest checkpoint" if self.resumes else "beginning anew"
        self._say(f"worker {ranks} died ({last}); {now}")

    def _look(self) -> None:
        """Read on: the furthest step that was told, and the nodes of the last group by rank."""
        for row in self._rows():
            self._step = max(self._step, int(row.get("step", 0)))
            self._nodes = row.get("nodes", self._nodes)

    def _say(self, words: str) -> None:
        # A full disk must not end a run for the sake of a message.
        with suppress(OSError):
            append(self.channel, json.dumps({"said": [words]}) + "\n")


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
