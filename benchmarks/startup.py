"""How soon something is to be seen: `--help` of every command, and the first training step.

python benchmarks/startup.py [--json]

The slowest `--help`, against the 0.3 s that DESIGN 1 allows. From `mlvicx pretrain` to the first
step's row on a private Ray cluster, two workers, against the same loop under torchrun; medians.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from scaling import Bench, Start, by_ray, by_torchrun
from table import Row, by_turns, main, seconds

ROUNDS, WITHIN_S = 3, 0.3
SHORT = ("views.image_size_px=64", "model.projector.width=256", "train.precision=float32")


def help_s() -> float:
    """The slowest `--help`, each the best of three."""
    mlvicx = [sys.executable, "-m", "mlvicx_dist"]
    said = subprocess.run([*mlvicx, "--help"], capture_output=True, text=True, check=True).stdout
    commands = re.findall(r"^    ([a-z]+)", said, re.MULTILINE)
    return max(
        min(
            seconds(partial(subprocess.run, [*mlvicx, name, "--help"], capture_output=True))
            for _ in range(3)
        )
        for name in commands
    )


def first_step_s(bench: Bench, start: Start) -> float:
    """From the command to the first row of a step."""
    path, run_dir = bench.settings(2, 32, *SHORT)
    began = time.perf_counter()
    process = start(path, 2)
    rows = run_dir / "metrics.jsonl"
    while not (rows.exists() and rows.stat().st_size) and process.poll() is None:
        time.sleep(0.05)
    found = time.perf_counter() - began
    if process.wait():
        raise SystemExit("a run of the benchmark failed")
    return found


def measure() -> list[Row]:
    """Help, then first steps by turns."""
    rows = [Row("--help, the slowest command, against the limit", help_s(), WITHIN_S, "s", 1.0)]
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch), 96)
        ways = {"ray": by_ray, "torchrun": by_torchrun}
        times = by_turns(
            {name: partial(first_step_s, bench, way) for name, way in ways.items()}, rounds=ROUNDS
        )
    name = "pretrain to its first step, 2 workers, against torchrun"
    return [*rows, Row(name, times["ray"], times["torchrun"], "s")]


if __name__ == "__main__":
    sys.exit(main(str(__doc__).splitlines()[0], measure))
