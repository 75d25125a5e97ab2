"""A group of workers without Ray: processes on this machine that run the loop."""

import os
import signal

import torch
import torch.distributed as dist
from processes import free_port, run_processes
from small import small_tree
from torch.multiprocessing.spawn import ProcessException

from mlvicx_dist.config import parse_config
from mlvicx_dist.errors import ResourceError
from mlvicx_dist.train.loop import train
from mlvicx_dist.train.notices import NoNotices, Notice
from mlvicx_dist.train.step import Member


class At(NoNotices):
    """Says a word at a step, counted in calls."""

    def __init__(self, word, step, start=0):
        self.said, self.step, self.calls = word, step, start

    def word(self):
        self.calls += 1
        return self.said if self.calls == self.step else Notice.NONE


def settings(shards, runs, **changes):
    """A small run as a tree of settings; `train__epochs=3` changes one."""
    tree = {
        "kind": "pretrain",
        "run": {"name": "small", "storage_path": str(runs), "samples_path": str(runs / "samples")},
        "data": {"shards": [{"path": str(shards)}], "loader_workers": 0},
        **small_tree(),
        "train": {
            "batch_size": 7,
            "epochs": 3,
            "optimizer": "adamw",
            "warmup_epochs": 1,
            "log_every_steps": 1,
            "deterministic": True,
        },
        "checkpoint": {"every_steps": 2, "keep": 3},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree.setdefault(section, {})[name] = value
    return tree


def member(rank, world_size, port, tree, run_dir, notices, kill_at, taken_at, judge, kind):
    """One worker; rank `kill_at[0]` is killed when its step `kill_at[1]` is done.

    From the row of step `taken_at` on, the run belongs to another driver. `kind`: of all numbers.
    """
    torch.set_num_threads(1)
    torch.set_default_dtype(kind)
    if world_size > 1:
        dist.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size
        )

    def fence():
        if len(rows) >= taken_at:
            raise ResourceError("taken.")

    rows = []

    def report(row):
        rows.append(row)
        if kill_at == (rank, row["step"]):
            os.kill(os.getpid(), signal.SIGKILL)

    config = parse_config(tree, "test")
    place = Member(rank, world_size, torch.device("cpu"))
    train(
        config,
        run_dir,
        place,
        report=report,
        notices=notices,
        fence=fence,
        judge=judge(config, place) if judge else None,
    )
    if world_size > 1:
        dist.destroy_process_group()


def run_group(
    tree,
    run_dir,
    world_size,
    *,
    notices=None,
    kill_at=None,
    taken_at=10**9,
    judge=None,
    kind=torch.float32,
):
    """Run a group to its end; whether a worker died on the way.

    Where sizes are compared, in float64: a rounding of float32 that takes another side of a ReLU or
    another maximum is seen within a few steps.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    notices = notices or NoNotices()
    arguments = (world_size, free_port(), tree, run_dir, notices, kill_at, taken_at, judge, kind)
    try:
        run_processes(member, arguments, world_size)
    except ProcessException:
        return True
    return False
