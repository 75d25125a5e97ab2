"""What all benchmarks share: rows with ratio and limit, a table or JSON, the exit code.

A ratio above 1 always means that ours is better; exit 1 where one is below its limit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

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


def interleaved(
    first: Callable[[], float], second: Callable[[], float], *, rounds: int
) -> tuple[float, float]:
    """Medians of two measurements by turns, A B A B, after one of each that does not count."""
    first()
    second()
    pairs = [(first(), second()) for _ in range(rounds)]
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def main(description: str, measure: Callable[[], Sequence[Row]]) -> int:
    """Measure and print; `--json` as one document on stdout."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    options = parser.parse_args()
    rows = measure()
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
