"""What single choices bring: a step's parts as they are against the same without one of them.

python benchmarks/choices.py [--json]

The default model, one thread a process. Optimizers: an update of all weights by foreach kernels,
against one weight after the other. Batches: 32 pairs of 224-px views from 256-px shards, written in
place, against samples that PyTorch stacks. Loss: the terms of a batch of 64, forward and backward,
two processes, with one gather for all heads, against one for each. Gradients: steps of two workers
on 96-px phantoms, a batch of 32: as views of DDP's buckets, against copies, and in bf16 on the
wire or with the rows of wide layers gathered (`train.gather_rows`), against float32; these two once
more on a link of 1 Gbit/s each way (root, unshare, tc). All by turns; medians.
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
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.distributed as dist
from scaling import DEFAULT, Bench, by_torchrun, folder_of, trained
from table import Row, by_turns, interleaved, main, peak_mb, seconds
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import default_collate

from mlvicx_dist.config import PretrainConfig, load_as
from mlvicx_dist.model.mlvicx import build_model
from mlvicx_dist.objective.global_batch import global_terms, weighted_loss
from mlvicx_dist.objective.terms import Terms
from mlvicx_dist.stream.augment import few_views
from mlvicx_dist.stream.loader import Steps
from mlvicx_dist.stream.shardset import ShardSet
from mlvicx_dist.train import step
from mlvicx_dist.train.allocator import keep_freed_memory
from mlvicx_dist.train.optim import make_optimizer

BATCH, ROUNDS, RUNS = 32, 9, 2
IMAGES = 7 * BATCH
SETTINGS = load_as(PretrainConfig, DEFAULT)
SHORT = ("views.image_size_px=96", "train.precision=float32", "train.gather_rows=false")
AS_IT_IS, COPIED, NARROW, ROWS = "as_it_is", "copied", "narrow", "rows"
SETTING = {NARROW: "train.gradients=bf16", ROWS: "train.gather_rows=true"}
SLOW = (
    *("unshare", "--net", "sh", "-c"),
    # Both directions of a loopback share its rate.
    "ip link set lo up && tc qdisc add dev lo root tbf rate 2gbit burst 2mb latency 400ms "
    '&& exec "$@"',
    "sh",
)
PEAK = "peak_mb"


def optimizers() -> list[Row]:
    """An update of all weights at once, against one after the other."""
    model = build_model(SETTINGS.model, 0)
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight) * 1e-3 if weight.requires_grad else None
    rows = []
    for name in ("lars", "adamw"):
        settings = SETTINGS.train.model_copy(update={"optimizer": name})
        whole = make_optimizer(model, settings)
        ours, theirs = interleaved(
            partial(seconds, whole.step), partial(seconds, _apart(whole).step), rounds=ROUNDS
        )
        rows.append(Row(f"{name}, foreach, against one weight after the other", ours, theirs, "s"))
    return rows


def _apart(optimizer: Any) -> Optimizer:
    """The same, each weight in a group of its own."""
    groups = [
        {**group, "params": [weight]}
        for group in optimizer.param_groups
        for weight in group["params"]
    ]
    made: Optimizer = type(optimizer)(groups, lr=0.0, weight_decay=0.0)
    return made


def batches(shards: Path) -> Row:
    """A batch written in place, against samples that are stacked."""
    steps = Steps(ShardSet.open([shards], splits=["train"]), SETTINGS.views, batch=BATCH, seed=0)

    def sample(index: int) -> list[Any]:
        views = few_views(
            steps.shards.image(index), SETTINGS.views, 2, seed=0, epoch=0, sample=index
        )
        return [torch.from_numpy(part) for part in views]

    def stacked() -> None:
        for column in steps.samples(0).T.tolist():
            for part in default_collate([sample(index) for index in column]):
                part.transpose(0, 1).contiguous()

    def in_place() -> None:
        for number in range(steps.steps_per_epoch):
            steps[number]

    def rate(call: Callable[[], None]) -> float:
        return BATCH * steps.steps_per_epoch / seconds(call)

    ours, theirs = interleaved(partial(rate, in_place), partial(rate, stacked), rounds=ROUNDS)
    return Row("a batch written in place, against samples stacked", ours, theirs, "pairs/s")


def gathers(folder: Path) -> Row:
    """The loss with one gather for all heads, against one for each."""
    found = folder / "loss.json"
    if by_torchrun(found, 2, __file__, "loss").wait():
        raise SystemExit("the loss of two processes failed")
    ours, theirs = json.loads(found.read_text())
    return Row("one gather for all heads, batch 64, against one for each", ours, theirs, "s")


def loss_worker(found: Path) -> None:
    """One of the processes of `gathers`; rank 0 writes both medians."""
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    views = [
        {
            head: torch.randn(BATCH, SETTINGS.model.projector.width, requires_grad=True)
            for head in ("global", "local")
        }
        for _ in range(2)
    ]
    shares = [BATCH, BATCH]

    def together() -> None:
        terms, _ = global_terms(*views, shares=shares)
        weighted_loss(terms, SETTINGS.loss).backward()

    def apart() -> None:
        terms: dict[str, Terms] = {}
        for head in views[0]:
            own = [{head: view[head]} for view in views]
            terms |= global_terms(*own, shares=shares)[0]
        weighted_loss(terms, SETTINGS.loss).backward()

    medians = interleaved(partial(seconds, together), partial(seconds, apart), rounds=2 * ROUNDS)
    if dist.get_rank() == 0:
        found.write_text(json.dumps(medians))
    dist.destroy_process_group()


def gradients(bench: Bench) -> list[Row]:
    """Whole steps of two workers, with what is done with gradients as it is and otherwise."""
    peaks: dict[str, list[float]] = {}

    def rate(kind: str, within: Sequence[str] = ()) -> float:
        runs = []

        def start(path: Path, workers: int) -> Any:
            runs.append(path)
            return by_torchrun(path, workers, __file__, kind, within=within)

        changed = [SETTING[kind]] if kind in SETTING else []
        made = bench.rate(start, 2, BATCH, *SHORT, *changed)
        for path in runs:
            peak = folder_of(load_as(PretrainConfig, path)) / PEAK
            peaks.setdefault(kind, []).append(json.loads(peak.read_text()))
        return made

    def rates(*kinds: str, within: Sequence[str] = ()) -> dict[str, float]:
        calls = {kind: partial(rate, kind, within) for kind in kinds}
        return by_turns(calls, rounds=RUNS, warm_up=False)

    here = rates(AS_IT_IS, COPIED, NARROW, ROWS)
    peak = {kind: statistics.median(found) for kind, found in peaks.items()}
    views = "gradients as views of DDP's buckets, against copies"
    wire = "gradients in bf16 on the wire, against float32"
    gathered = "rows gathered in place of gradients, against float32"
    rows = [
        Row(views, here[AS_IT_IS], here[COPIED], "images/s"),
        Row("the same, peak memory of a worker", peak[AS_IT_IS], peak[COPIED], "MB"),
        Row(wire, here[NARROW], here[AS_IT_IS], "images/s"),
        Row(gathered, here[ROWS], here[AS_IT_IS], "images/s"),
    ]
    if subprocess.run([*SLOW, "true"], check=False).returncode:
        print("no link can be made slow here: that takes root, unshare and tc", file=sys.stderr)
        return rows
    slow = rates(AS_IT_IS, NARROW, ROWS, within=SLOW)
    for name, kind in ((wire, NARROW), (gathered, ROWS)):
        rows.append(Row(f"1 Gbit/s, {name}", slow[kind], slow[AS_IT_IS], "images/s"))
    return rows


class _Copied(DistributedDataParallel):
    """DDP whose gradients are not views of its buckets."""

    def __init__(self, module: torch.nn.Module, **options: Any) -> None:
        super().__init__(module, **{**options, "gradient_as_bucket_view": False})


def gradient_worker(path: Path, kind: str) -> None:
    """One worker of `gradients`; rank 0 leaves its peak memory in the run's folder."""
    if kind == COPIED:
        step.DistributedDataParallel = _Copied  # type: ignore[misc, attr-defined]
    config = load_as(PretrainConfig, path)
    peak = peak_mb(partial(trained, config))
    if os.environ["RANK"] == "0":
        (folder_of(config) / PEAK).write_text(json.dumps(peak))


def measure() -> list[Row]:
    """One after the other."""
    torch.set_num_threads(1)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bench = Bench(folder, IMAGES)
        return [*optimizers(), batches(folder / "shards"), gathers(folder), *gradients(bench)]


def worker(path: Path, kind: str) -> None:
    """What torchrun starts."""
    if kind == "loss":
        loss_worker(path)
    else:
        gradient_worker(path, kind)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(Path(sys.argv[2]), sys.argv[3])
    else:
        sys.exit(main(str(__doc__).splitlines()[0], measure))
