"""What each Ray Train worker runs: its place in the group, then the loop."""

from __future__ import annotations

from fnmatch import fnmatch
from functools import partial
from typing import Any

from mlvicx_dist.config import PretrainConfig, parse_config
from mlvicx_dist.errors import DataError, ResourceError
from mlvicx_dist.storage import PATIENCE_S, Place, insist, is_local, place, reaching, write_whole

TOKEN = ".driver-{}"
"""A file that the driver puts into the run's folder, in place of that of a driver before it.

A worker whose node does not see it has another disk. A worker that no longer sees it has outlived
its driver, and must not write beside the workers of the next one.
"""


def train_worker(plan: dict[str, Any]) -> int:
    """Train as one worker of a group; the number of steps done.

    Args:
        plan: `settings`, `run_dir`, `token`, `guard` and `check_memory`, as the driver wrote them.
    """
    import ray.train
    import ray.train.torch
    import torch

    from mlvicx_dist.train.guard import FromRay
    from mlvicx_dist.train.loop import Member, train
    from mlvicx_dist.train.memory import check_memory

    config = parse_config(plan["settings"], "the run's settings")
    assert isinstance(config, PretrainConfig)
    run_dir = place(plan["run_dir"])
    check_shared(run_dir, plan["token"])
    torch.set_num_threads(config.workers.cpus_per_worker)
    context = ray.train.get_context()
    rank = context.get_world_rank()
    if plan["check_memory"]:
        size, here = context.get_world_size(), context.get_local_world_size()
        check_memory(config, size, node_workers=here, where="a node")
    member = Member(rank, context.get_world_size(), ray.train.torch.get_device())
    notices = FromRay(plan["guard"], rank=rank)
    return train(
        config,
        run_dir,
        member,
        report=ray.train.report,
        notices=notices,
        fence=partial(check_owner, run_dir, plan["token"]),
    )


def check_shared(run_dir: Place, token: str) -> None:
    """See that this node's run folder is the driver's.

    Raises:
        DataError: it is another one, or cannot be reached.
    """
    try:
        patience_s = 0 if is_local(run_dir) else PATIENCE_S
        seen = insist(run_dir, lambda: _sees(run_dir, token), patience_s)
    except OSError as error:
        raise DataError(
            f"{run_dir}: a worker's node cannot reach the run's folder ({error.strerror or error});"
            " check that all nodes have access to it."
        ) from None
    if not seen:
        raise DataError(
            f"{run_dir}: the run's folder is not shared by all nodes; set run.storage_path to a "
            "network folder that all of them mount, or to an s3:// or gs:// URL."
        )


def check_owner(run_dir: Place, token: str) -> None:
    """See, before something is written, that the run still belongs to this group's driver.

    Raises:
        ResourceError: another driver has taken it.
        OSError: the folder cannot be reached.
    """
    if not _sees(run_dir, token):
        raise ResourceError(
            f"{run_dir}: another process has taken this run since its driver ended; it goes on "
            "there."
        )


def take_over(run_dir: Place, token: str) -> None:
    """Let the run belong to the driver of this token, and to no other."""
    with reaching(run_dir):
        # A store has no folder before there is something in it.
        there = run_dir.iterdir() if run_dir.is_dir() else ()
        others = [path for path in there if fnmatch(path.name, TOKEN.format("*"))]
    write_whole(run_dir / TOKEN.format(token), b"")
    with reaching(run_dir):
        for path in others:
            path.unlink(missing_ok=True)


def _sees(run_dir: Place, token: str) -> bool:
    with reaching(run_dir):
        return bool((run_dir / TOKEN.format(token)).exists())
