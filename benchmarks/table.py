"""What all benchmarks share: rows with ratio and limit, a table or JSON, the exit code.

A ratio above 1 always means that ours is better; exit 1 where one is below its limit.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from mlvicx_dist.train.versions import library_versions, machine


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: What is compared, with its size.
        ours: Our figure, in `unit`.
        theirs: The other's.
        unit: Such as images/s, where more is better, or s and MB, where less is.
        limit: The least ratio allowed; None where there is none.
    """

    name: str
    ours: float
    theirs: float
    unit: str
    limit: float | None = None

    @property
    def ratio(self) -> float:
        """Ours over theirs for rates, theirs over ours for times and bytes."""
        rate = self.unit.endswith("/s")
        return self.ours / self.theirs if rate else self.theirs / self.ours


def by_turns(
    calls: Mapping[str, Callable[[], float]], *, rounds: int, warm_up: bool = True
) -> dict[str, float]:
    """Medians of several measurements by turns, A B C A B C, after one of each as a warm-up."""
    if warm_up:
        for call in calls.values():
            call()
    found = [{name: call() for name, call in calls.items()} for _ in range(rounds)]
    return {name: statistics.median(turn[name] for turn in found) for name in calls}


def interleaved(
    first: Callable[[], float], second: Callable[[], float], *, rounds: int
) -> tuple[float, float]:
    """The medians of two measurements by turns, A B A B."""
    medians = by_turns({"first": first, "second": second}, rounds=rounds)
    return medians["first"], medians["second"]


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def peak_mb(call: Callable[[], object]) -> float:
    """The most resident memory that a call takes above what stood before it, in MB (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_mb("VmRSS")
    call()
    return max(_status_mb("VmHWM") - before, 1e-3)


def _status_mb(name: str) -> float:
    """A line of /proc/self/status, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1e3
    raise KeyError(name)


def main(description: str, measure: Callable[[], Iterable[Row]]) -> int:
    """Measure and print; `--json` as one document on stdout, while each row is told on stderr."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    options = parser.parse_args()
    rows = []
    for row in measure():
        rows.append(row)
        print(f"{row.name}: {row.ours:.4g} and {row.theirs:.4g} {row.unit}", file=sys.stderr)
    if options.json:
        about = {**machine(), **library_versions()}
        listed = [{**asdict(row), "ratio": row.ratio} for row in rows]
        print(json.dumps({"rows": listed, "machine": about}))
    else:
        width = max(len(row.name) for row in rows)
        print(f"{'':{width}}  {'ours':>10}  {'theirs':>10}  {'unit':8}  {'ratio':>6}  limit")
        for row in rows:
            limit = "" if row.limit is None else f"{row.limit:g}"
            print(
                f"{row.name:{width}}  {row.ours:>10.4g}  {row.theirs:>10.4g}  {row.unit:8}  "
                f"{row.ratio:>6.2f}  {limit}"
            )
    missed = [row.name for row in rows if row.limit is not None and row.ratio < row.limit]
    for name in missed:
        print(f"below its limit: {name}", file=sys.stderr)
    return 1 if missed else 0
