"""All benchmarks, one after the other, into benchmarks/RESULTS.md.

python benchmarks/run.py [NAME ...]

With names, only those are measured; the others keep the tables that they have. What is written by
hand, from "Before and after" on, stays. Exit 1 where a row is below its limit.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "RESULTS.md"
NAMES = (
    "step",
    "covariance",
    "covariance_shares",
    "loader",
    "ingest",
    "scaling",
    "choices",
    "startup",
    "checkpoint",
    "sweep_overhead",
    "bootstrap",
    "plan",
)
HEAD = """\
# What was measured

`make bench` writes this page; `python benchmarks/run.py step` measures one again. A ratio above 1
means that ours is better, the limit is the least ratio allowed. Contenders are measured by turns in
one run, as each script says at its top with threads, sizes and rounds; figures of different days or
machines are not to be compared. A benchmark without a table here was not measured in this form yet.
"""
TAIL = "## Before and after\n"


def section(name: str) -> str:
    """Run a benchmark: its table."""
    print(f"{name}: measuring", file=sys.stderr)
    done = subprocess.run(
        [sys.executable, str(HERE / f"{name}.py"), "--json"], stdout=subprocess.PIPE, check=False
    )
    if done.returncode not in (0, 1) or not done.stdout:
        raise SystemExit(f"{name}.py ended with {done.returncode} and measured nothing")
    found = json.loads(done.stdout)
    lines = [f"## {name}", "", about(found["machine"]), "", "| | ours | theirs | ratio | limit |"]
    lines += ["|---|---|---|---|---|", *(line(row) for row in found["rows"])]
    return "\n".join(lines) + "\n"


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    limit = "" if row["limit"] is None else f"{row['limit']:.3g}"
    missed = " (missed)" if row["limit"] is not None and row["ratio"] < row["limit"] else ""
    return (
        f"| {row['name']} | {row['ours']:.4g} {row['unit']} | {row['theirs']:.4g} {row['unit']} "
        f"| {row['ratio']:.2f}{missed} | {limit} |"
    )


def about(machine: dict[str, Any]) -> str:
    """When and where."""
    told = ", ".join(f"{key} {value}" for key, value in machine.items())
    return f"{time.strftime('%Y-%m-%d')}: {told}."


def main() -> int:
    """Measure, and write the page after each benchmark."""
    unknown = sorted(set(sys.argv[1:]) - set(NAMES))
    if unknown:
        raise SystemExit(f"{unknown[0]}: no such benchmark; there are {', '.join(NAMES)}")
    page = RESULTS.read_text() if RESULTS.exists() else HEAD + "\n" + TAIL
    before, _, by_hand = page.partition(TAIL)
    tables = {m[1]: m[0] for m in re.finditer(r"^## (\w+)\n(?:(?!## ).*\n)*", before, re.MULTILINE)}
    for name in sys.argv[1:] or NAMES:
        tables[name] = section(name)
        listed = "\n".join(tables[one].rstrip("\n") + "\n" for one in NAMES if one in tables)
        RESULTS.write_text(f"{HEAD}\n{listed}\n{TAIL}{by_hand}")
    return int("(missed)" in RESULTS.read_text().partition(TAIL)[0])


if __name__ == "__main__":
    sys.exit(main())
