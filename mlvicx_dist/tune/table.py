"""A sweep as it runs: a rich table on a terminal, a line for each look in a log; on stderr."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table as RichTable

from mlvicx_dist.progress import plain, say
from mlvicx_dist.tune.records import Record, Records, best
from mlvicx_dist.tune.space import described

ROWS = 24
"""Trials that the table shows: those that run, then the best."""


class Table:
    """Says what happens to the trials."""

    def __init__(self, records: Records, *, trials: int, total: int) -> None:
        self.records, self.trials, self.total = records, trials, total

    def look(self, record: Record) -> None:
        """A trial was looked at."""
        if record.looks:
            leader = best(self.records.all())
            ahead = f"; best {leader.target:.4f}, trial {leader.name}" if leader else ""
            self.say(
                f"trial {record.name}: step {record.reached} of {self.total}, "
                f"target {record.target:.4f}{ahead}"
            )

    def end(self, record: Record) -> None:
        """A trial ended."""
        ended = sum(one.state != "running" for one in self.records.all())
        why = f": {record.cause}" if record.cause else f", {described(record.point)}"
        self.say(f"trial {record.name} {record.state}{why} ({ended} of {self.trials} ended)")

    def say(self, line: str) -> None:
        """Something that must be seen."""
        say(line)


class _Live(Table):
    """The same on a terminal, redrawn in its place."""

    def __init__(self, records: Records, live: Live, *, trials: int, total: int) -> None:
        super().__init__(records, trials=trials, total=total)
        self._live = live

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks, and what they lead to, to a file that nobody reads.
        return {key: value for key, value in self.__dict__.items() if key != "_live"}

    def look(self, record: Record) -> None:
        self._live.update(drawn(self.records.all(), trials=self.trials, total=self.total))

    def end(self, record: Record) -> None:
        self._live.update(drawn(self.records.all(), trials=self.trials, total=self.total))
        if record.cause:
            self.say(f"trial {record.name} {record.state}: {record.cause}")

    def say(self, line: str) -> None:
        self._live.console.print(plain(line), markup=False)


def drawn(records: list[Record], *, trials: int, total: int) -> RichTable:
    """The trials that run and the best of the others."""
    counts = [f"{count} {state}" for state, count in Counter(r.state for r in records).items()]
    table = RichTable(title=f"{len(records)} of {trials} trials: {', '.join(counts)}")
    for heading in ("trial", "state", "step", "target", "point"):
        table.add_column(heading, justify="right" if heading in ("step", "target") else "left")
    leader = best(records)
    order = sorted(records, key=lambda r: (r.state != "running", -(r.target or 0.0)))
    for record in order[:ROWS]:
        target = "" if record.target is None else f"{record.target:.4f}"
        style = "bold" if record is leader else None
        cells = (
            record.name,
            record.state,
            f"{record.reached}/{total}",
            target,
            described(record.point),
        )
        table.add_row(*cells, style=style)
    return table


@contextmanager
def shown(records: Records, *, trials: int, total: int) -> Iterator[Table]:
    """Show the trials while the block runs."""
    if not sys.stderr.isatty():
        yield Table(records, trials=trials, total=total)
        return
    with Live(console=Console(stderr=True), transient=True, refresh_per_second=2) as live:
        yield _Live(records, live, trials=trials, total=total)
