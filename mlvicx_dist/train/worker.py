"""What each Ray Train worker runs: its place in the group, then the loop."""

from __future__ import annotations

from functools import partial
from typing import Any

from mlvicx_dist.config import PretrainConfig, parse_config
from mlvicx_dist.storage import place
from mlvicx_dist.train.owner import check_owner, check_shared


def train_worker(plan: dict[str, Any]) -> int:
    """Train as one worker of a group; the number of steps done.

    Args:
        plan: `settings`, `run_dir`, `token`, `guard`, `check_memory` and `judge`, as the driver
            wrote them.
    """
    import ray.train
    import ray.train.torch
    import torch

    from mlvicx_dist.train.allocator import keep_freed_memory
    from mlvicx_dist.train.guard import FromRay
    from mlvicx_dist.train.loop import Member, train
    from mlvicx_dist.train.memory import check_memory

    config = parse_config(plan["settings"], "the run's settings")
    assert isinstance(config, PretrainConfig)
    run_dir = place(plan["run_dir"])
    check_shared(run_dir, plan["token"])
    torch.set_num_threads(config.workers.cpus_per_worker)
    if not config.workers.use_gpu:
        keep_freed_memory()
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
        judge=plan["judge"](config, member) if plan["judge"] else None,
    )
