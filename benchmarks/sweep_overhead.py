"""What Tune costs: two trials of a sweep at once against two `mlvicx pretrain` at once, images/s.

python benchmarks/sweep_overhead.py [--json]

A ResNet-18 at 64 px, one worker of one core a run: both fill a machine of two cores, so that what
Tune and its processes do is taken from the training. By turns; steps after the first, the rate of a
pair is that of its slower run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from itertools import count
from pathlib import Path

import yaml
from table import Row, interleaved, main

from mlvicx_dist.ingest.pack import pack
from mlvicx_dist.ingest.shard_task import PackSettings
from mlvicx_dist.ingest.shards import read_manifest
from mlvicx_dist.ingest.sources.anatomy import CLASSES
from mlvicx_dist.ingest.sources.folder import Columns, list_csv
from mlvicx_dist.ingest.sources.phantom import write_phantoms
from mlvicx_dist.ingest.splits import Fractions

BATCH, IMAGES, ROUNDS = 32, 1000, 2
LIMIT = 0.95


def settings(shards: Path) -> dict[str, object]:
    """What both train."""
    return {
        "data": {"shards": [{"path": str(shards)}]},
        "views": {"image_size_px": 64, "blur_kernel_px": 7},
        "model": {"projector": {"width": 256}, "local": {"resize_px": 16, "channels": 64}},
        "train": {
            "batch_size": BATCH,
            "epochs": 1,
            "optimizer": "adamw",
            "learning_rate_per_256": 1e-3,
            "warmup_epochs": 0.1,
            "log_every_steps": 1,
        },
        "checkpoint": {"every_s": 1_000_000, "keep": 1},
    }


def rate(runs: list[Path]) -> float:
    """Images/s of the slowest from its first step to its last but one; at the last one it looks."""
    rates = []
    for run in runs:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        at = {row["step"]: row["time_s"] for row in map(json.loads, lines) if "time_s" in row}
        last = max(at) - 1
        rates.append(BATCH * (last - 1) / (at[last] - at[1]))
    return min(rates)


def ended(commands: list[list[str]]) -> None:
    """Run commands at once, to their end."""
    mlvicx = [sys.executable, "-m", "mlvicx_dist"]
    begun = [
        subprocess.Popen([*mlvicx, *command], stdout=subprocess.DEVNULL) for command in commands
    ]
    for command, process in zip(commands, begun, strict=True):
        if process.wait():
            raise SystemExit(f"mlvicx {' '.join(command)}: exit {process.returncode}")


def measure() -> list[Row]:
    """The two by turns."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        table = write_phantoms(folder / "images", IMAGES, size_px=96)
        listing = list_csv(
            folder / "images", table, name="phantom", columns=Columns(), classes=CLASSES
        )
        whole = PackSettings(fractions=Fractions(0.95, 0.05, 0.0))
        pack(listing.records, folder / "shards", settings=whole, salt=b"\0" * 32)
        steps = read_manifest(folder / "shards").splits["train"] // BATCH
        tree = settings(folder / "shards")
        alone, swept = folder / "pretrain.yaml", folder / "sweep.yaml"
        alone.write_text(yaml.safe_dump({"kind": "pretrain", **tree}))
        sweep = {
            "kind": "sweep",
            "storage_path": str(folder),
            "pretrain": tree,
            "space": {"loss.lambda_local": {"choice": [0.9, 1.0]}},
            "search": {"by": "grid"},
            "asha": None,
            "target": {"every_steps": steps, "images": 50},
            "confirm": {"seeds": 0},
        }
        swept.write_text(yaml.safe_dump(sweep))
        counts = count()

        def trials() -> float:
            name = f"sweep{next(counts)}"
            ended([["sweep", str(swept), "--set", f"name={name}"]])
            return rate([folder / name / "trials" / f"{number:04d}" for number in range(2)])

        def runs() -> float:
            names = [f"run{next(counts)}" for _ in range(2)]
            where = f"run.storage_path={folder}"
            ended(
                [
                    ["pretrain", str(alone), "--set", where, "--set", f"run.name={name}"]
                    for name in names
                ]
            )
            return rate([folder / name for name in names])

        ours, theirs = interleaved(trials, runs, rounds=ROUNDS)
        name = f"two trials against two runs of 64 px, batch {BATCH}"
        return [Row(name, ours, theirs, "images/s", LIMIT)]


if __name__ == "__main__":
    sys.exit(main(str(__doc__).splitlines()[0], measure))
