"""What a driver tells of its workers: their rows as progress, their silence, and why none come."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from mlvicx_dist.capacity import refused_launches
from mlvicx_dist.errors import ResourceError
from mlvicx_dist.progress import Progress, duration

REFUSALS_S = 20.0
"""How often the autoscaler is asked what it was refused, while workers are waited for."""

Row = dict[str, Any]


class Shown:
    """Rows of the workers as progress on the driver.

    Attributes:
        started: Whether any group has begun.
        resumed: The step that the first one went on from.
        world_size: Workers of the group that is at work; 0 where there is none.
    """

    def __init__(self, bar: Progress, heard: Callable[[Row], None]) -> None:
        self._bar, self._heard, self._step = bar, heard, 0
        self.started, self.resumed, self.world_size = False, 0, 0
        self._silence = Silence()

    def __call__(self, row: Row) -> None:
        """Show a row and hand it on."""
        self._show(row)
        self._heard(row)

    def _show(self, row: Row) -> None:
        for words in row.get("said", ()):
            self._bar.say(words)
        if "step" not in row:
            # What a group that is at work says, or else who saw it go.
            self.world_size = int(row.get("world_size", 0))
            return
        self._silence.hear(row)
        step = int(row["step"])
        if "loss" not in row:
            if not self.started:
                self.started, self._step, self.resumed = True, step, step
                self._bar.skip(step)
            self.world_size = int(row["world_size"])
            more = "s" if self.world_size > 1 else ""
            nodes = placed(row.get("nodes", ()))
            self._bar.say(f"{self.world_size} worker{more} from step {step}{nodes}")
            return
        terms = ", ".join(
            f"{name} {row[name]:.3g}" for name in row if name.endswith("_weighted")
        ).replace("_weighted", "")
        terms = f" ({terms})" if terms else ""
        self._bar.advance(
            max(step - self._step, 0),
            f"{row['images_per_s']:.0f} images/s, data wait {row['data_wait']:.0%}, "
            f"loss {row['loss']:.4g}{terms}",
        )
        self._step = max(step, self._step)

    def check_silence(self, limit_s: float) -> None:
        """End a wait for workers that is longer than a user wants.

        Raises:
            ResourceError: nothing was heard of any worker for `limit_s`.
        """
        remedy = "the same command goes on from the newest checkpoint."
        self._silence.check(limit_s, f"step {self._step}", remedy)


class Silence:
    """How long nothing was heard of the workers; that some of them died is no word of theirs."""

    def __init__(self) -> None:
        self._heard_s = time.monotonic()

    def hear(self, row: Row) -> None:
        """Take a row."""
        if "step" in row:
            self._heard_s = time.monotonic()

    def check(self, limit_s: float, where: str, remedy: str) -> None:
        """End a wait that is longer than a user wants.

        Raises:
            ResourceError: nothing was heard for `limit_s`.
        """
        if time.monotonic() - self._heard_s > limit_s:
            raise ResourceError(
                f"{where}: nothing was heard of the workers for {duration(limit_s)}; see with "
                "'ray status' whether the cluster has room for them, or raise workers.wait_s; "
                f"{remedy}"
            )


class Refusals:
    """Says, once each, which machines the autoscaler was refused while workers are waited for."""

    def __init__(self, bar: Progress) -> None:
        self._bar, self._told = bar, set[str]()
        self._look_s = time.monotonic() + REFUSALS_S

    def tell(self) -> None:
        """Ask now and then."""
        if time.monotonic() < self._look_s:
            return
        self._look_s = time.monotonic() + REFUSALS_S
        for words in refused_launches():
            if words not in self._told:
                self._told.add(words)
                self._bar.say(f"the autoscaler was refused {words}")


def placed(nodes: Sequence[str]) -> str:
    """Which ranks are on which of several nodes, in words that follow others."""
    if len(set(nodes)) < 2:
        return ""
    told, rank = [], 0
    for node, ranks in groupby(nodes):
        last = rank + len(list(ranks)) - 1
        told.append(f"{rank} on {node}" if last == rank else f"{rank} to {last} on {node}")
        rank = last + 1
    return f" (rank {', '.join(told)})"
