"""Two workers of one thread against one worker of one thread: images/s of whole training steps.

python benchmarks/workers.py [--json]

The default model and objective, a global batch of 64, phantom radiographs, one loader process a
worker; each figure is the median of a few steps after three that do not count, in which a worker's
memory still grows, by turns. Without Ray: it starts the workers and is not part of a step.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from table import Row, main

from mlvicx_dist.config import PretrainConfig, load_as
from mlvicx_dist.ingest.pack import pack
from mlvicx_dist.ingest.shard_task import PackSettings
from mlvicx_dist.ingest.sources.anatomy import CLASSES
from mlvicx_dist.ingest.sources.folder import Columns, list_csv
from mlvicx_dist.ingest.sources.phantom import write_phantoms
from mlvicx_dist.ingest.splits import Fractions
from mlvicx_dist.train.allocator import keep_freed_memory
from mlvicx_dist.train.loop import Member, train
from mlvicx_dist.train.notices import NoNotices
from mlvicx_dist.train.versions import bf16_in_software

BATCH, WARM_UP, STEPS, ROUNDS = 64, 3, 3, 2
DEFAULT = Path(__file__).parents[1] / "configs" / "pretrain" / "default.yaml"


def settings(folder: Path, precision: str) -> list[str]:
    """What is other than in the default."""
    return [
        "data.loader_workers=1",
        f"train.precision={precision}",
        f"data.shards=[{{path: {folder / 'shards'}}}]",
        f"run.storage_path={folder}",
        f"train.batch_size={BATCH}",
        "train.epochs=1",
        "train.warmup_epochs=0",
        "train.log_every_steps=1",
        "checkpoint.every_s=1000000",
    ]


def worker(rank: int, world_size: int, port: int, folder: Path, precision: str) -> None:
    """One worker; rank 0 writes the seconds of each step."""
    torch.set_num_threads(1)
    keep_freed_memory()
    if world_size > 1:
        dist.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size
        )
    config = load_as(PretrainConfig, DEFAULT, settings(folder, precision))
    run_dir = folder / f"run{port}"
    run_dir.mkdir(exist_ok=True)
    times: list[float] = []

    def report(row: dict[str, Any]) -> None:
        times.append(time.perf_counter())
        ended = len(times) == WARM_UP + STEPS + 1
        if ended and rank == 0:
            (folder / "times").write_text(json.dumps([b - a for a, b in pairwise(times[WARM_UP:])]))
        if ended:
            os._exit(0)

    member = Member(rank, world_size, torch.device("cpu"))
    train(config, run_dir, member, report=report, notices=NoNotices())


def images_per_s(world_size: int, folder: Path, precision: str) -> float:
    """The median rate of a group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (world_size, port, folder, precision), nprocs=world_size)
    return BATCH / statistics.median(json.loads((folder / "times").read_text()))


def measure() -> list[Row]:
    """The two groups by turns."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        count = BATCH * (WARM_UP + STEPS + 1)
        table = write_phantoms(folder / "images", count, size_px=256)
        columns = Columns()
        listing = list_csv(
            folder / "images", table, name="phantom", columns=columns, classes=CLASSES
        )
        whole = PackSettings(fractions=Fractions(1.0, 0.0, 0.0))
        pack(listing.records, folder / "shards", settings=whole, salt=b"\0" * 32)
        rows = []
        # Where a CPU has no bf16, a step takes minutes.
        for precision in ("float32",) if bf16_in_software() else ("float32", "bf16"):
            pairs = [
                (images_per_s(2, folder, precision), images_per_s(1, folder, precision))
                for _ in range(ROUNDS)
            ]
            ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
            name = f"2 workers against 1, batch {BATCH}, {precision}"
            rows.append(Row(name, ours, theirs, "images/s", 1.8))
        return rows


if __name__ == "__main__":
    sys.exit(main(str(__doc__).splitlines()[0], measure))
