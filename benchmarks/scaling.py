"""What a second worker brings, what Ray costs a step, and how many bytes a step exchanges.

python benchmarks/scaling.py [--json]

Whole training steps on phantom radiographs, each worker with one thread and one loader process. The
default model at 224 px, a global batch of 64: two workers against one, and against two runs of half
the batch each that know nothing of each other, which is what this machine's two cores can do; of
all of them the share of a step that waits for its batch. At 96 px and 32 images, two workers:
started by Ray (`mlvicx pretrain`) against torchrun. Each figure is the median of the steps after
the first, in which a worker's memory still grows, by turns.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from table import Row, by_turns, main

from mlvicx_dist.config import PretrainConfig, load_as, to_tree
from mlvicx_dist.ingest.pack import pack
from mlvicx_dist.ingest.shard_task import PackSettings
from mlvicx_dist.ingest.sources.anatomy import CLASSES
from mlvicx_dist.ingest.sources.folder import Columns, list_csv
from mlvicx_dist.ingest.sources.phantom import write_phantoms
from mlvicx_dist.ingest.splits import Fractions
from mlvicx_dist.model.mlvicx import build_model
from mlvicx_dist.train.allocator import keep_freed_memory
from mlvicx_dist.train.loop import train
from mlvicx_dist.train.notices import NoNotices
from mlvicx_dist.train.step import Member, gathered_layers
from mlvicx_dist.train.versions import bf16_in_software

WARM_UP, STEPS, ROUNDS = 3, 3, 2
SHORT_ROUNDS = 6
"""Of the shorter runs under Ray and torchrun, which are to be told apart by a twentieth."""
DEFAULT = Path(__file__).parents[1] / "configs" / "pretrain" / "default.yaml"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
EXCHANGED = "exchanged_mb"


class Bench:
    """Runs of one set of images, each in a folder of its own below `folder`."""

    def __init__(self, folder: Path, images: int) -> None:
        self._folder, self._names = folder, count()
        self.waits: list[float] = []
        """Shares of the steps that runs waited for their batches."""
        whole = PackSettings(fractions=Fractions(1.0, 0.0, 0.0))
        table = write_phantoms(folder / "images", images, size_px=256)
        listing = list_csv(
            folder / "images", table, name="phantom", columns=Columns(), classes=CLASSES
        )
        pack(listing.records, folder / "shards", settings=whole, salt=b"\0" * 32)

    def settings(self, workers: int, batch: int, *overrides: str) -> tuple[Path, Path]:
        """A file of settings and the folder of its run."""
        name = f"run{next(self._names)}"
        config = load_as(
            PretrainConfig,
            DEFAULT,
            [
                f"run={{name: {name}, storage_path: {self._folder}}}",
                f"data={{shards: [{{path: {self._folder / 'shards'}}}], loader_workers: 1}}",
                f"train.batch_size={batch}",
                "train.epochs=1",
                "train.warmup_epochs=0",
                "train.log_every_steps=1",
                "checkpoint.every_s=1000000",
                f"workers={{num: {workers}, use_gpu: false}}",
                *overrides,
            ],
        )
        path = self._folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(to_tree(config)))
        return path, self._folder / name

    def rate(self, start: Start, workers: int, batch: int, *overrides: str, runs: int = 1) -> float:
        """Images/s of `runs` runs at once, the sum of the medians of their steps."""
        made = [self.settings(workers, batch, *overrides) for _ in range(runs)]
        begun = [start(path, workers) for path, _ in made]
        if any(process.wait() for process in begun):
            raise SystemExit("a run of the benchmark failed")
        total = 0.0
        for _, run_dir in made:
            lines = (run_dir / "metrics.jsonl").read_text().splitlines()
            rows = [row for row in map(json.loads, lines) if "time_s" in row][WARM_UP - 1 :]
            self.waits += [row["data_wait"] for row in rows[1:]]
            steps = pairwise(row["time_s"] for row in rows)
            total += batch / statistics.median(b - a for a, b in steps)
        return total

    def exchanged_mb(self, workers: int, batch: int, *overrides: str) -> tuple[float, float]:
        """What a worker gives to collectives in a step, and the size of all gradients."""
        path, run_dir = self.settings(workers, batch, *overrides)
        if by_torchrun(path, workers).wait():
            raise SystemExit("a run of the benchmark failed")
        found: tuple[float, float] = tuple(json.loads((run_dir / EXCHANGED).read_text()))
        return found


Start = Callable[[Path, int], "subprocess.Popen[bytes]"]


def by_torchrun(
    path: Path, workers: int, script: str = __file__, *more: str, within: Sequence[str] = ()
) -> subprocess.Popen[bytes]:
    """The loop under torchrun, as the `--worker` of a script, started by another command."""
    command = [
        *within,
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={workers}", script, "--worker", str(path), *more),
    ]
    return subprocess.Popen(command, env=ENVIRONMENT)


def by_ray(path: Path, workers: int) -> subprocess.Popen[bytes]:
    """The same run as a user starts it."""
    command = [sys.executable, "-m", "mlvicx_dist", "pretrain", str(path), "--json"]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL)


def worker(path: str) -> None:
    """One worker under torchrun; rank 0 leaves in the run's folder how many MB it exchanges."""
    given = [0]
    dist.all_reduce = _counted(dist.all_reduce, 0, given)
    dist.all_gather = _counted(dist.all_gather, 1, given)
    config = load_as(PretrainConfig, path)
    steps = trained(config)
    model = build_model(config.model, 0)
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    # DDP's own do not pass through here.
    reduced = gradients - sum(layer.weight.nbytes for layer in gathered_layers(model, config.train))
    told = [(given[0] / steps + reduced) / 1e6, gradients / 1e6]
    (folder_of(config) / EXCHANGED).write_text(json.dumps(told))


def trained(config: PretrainConfig) -> int:
    """A run's steps, done by this process as one worker of the group that torchrun made."""
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo")
    member = Member(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    run_dir = folder_of(config)
    run_dir.mkdir(exist_ok=True)
    steps = train(config, run_dir, member, report=lambda row: None, notices=NoNotices())
    dist.destroy_process_group()
    return steps


def folder_of(config: PretrainConfig) -> Path:
    """Where a run writes."""
    return Path(config.run.storage_path) / config.run.name


def _counted(collective: Callable[..., Any], own: int, given: list[int]) -> Callable[..., Any]:
    """A collective that adds up the bytes of its argument number `own`."""

    def call(*arguments: Any, **options: Any) -> Any:
        given[0] += arguments[own].nbytes
        return collective(*arguments, **options)

    return call


def measure() -> list[Row]:
    """The groups by turns."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch), 64 * (WARM_UP + STEPS + 1))
        # Where a CPU has no bf16, a step takes minutes.
        for precision in ("float32",) if bf16_in_software() else ("float32", "bf16"):
            kind = f"train.precision={precision}"
            rates = by_turns(
                {
                    "two": partial(bench.rate, by_torchrun, 2, 64, kind),
                    "one": partial(bench.rate, by_torchrun, 1, 64, kind),
                    "apart": partial(bench.rate, by_torchrun, 1, 32, kind, runs=2),
                },
                rounds=ROUNDS,
                warm_up=False,
            )
            name = f"2 workers, 224 px, batch 64, {precision}, against "
            rows.append(Row(name + "1", rates["two"], rates["one"], "images/s", 1.8))
            rows.append(Row(name + "2 apart", rates["two"], rates["apart"], "images/s"))
        waited = max(statistics.median(bench.waits), 1e-4)
        rows.append(Row("data wait, 224 px, against the limit", waited, 0.05, "of a step", 1.0))
        short = ("views.image_size_px=96", "train.precision=float32")
        ways = {"Ray": by_ray, "torchrun": by_torchrun}
        rates = by_turns(
            {name: partial(bench.rate, way, 2, 32, *short) for name, way in ways.items()},
            rounds=SHORT_ROUNDS,
            warm_up=False,
        )
        name = "2 workers, 96 px, batch 32, Ray against torchrun"
        rows.append(Row(name, rates["Ray"], rates["torchrun"], "images/s", 0.95))
        given, gradients = bench.exchanged_mb(2, 32, *short)
        rows.append(Row("exchanged a step, against all gradients", given, gradients, "MB"))
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2])
    else:
        sys.exit(main(str(__doc__).splitlines()[0], measure))
