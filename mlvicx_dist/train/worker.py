"""What each Ray Train worker runs: its place in the group, then the loop."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from mlvicx_dist.config import PretrainConfig, Workers, parse_config
from mlvicx_dist.storage import place
from mlvicx_dist.train.owner import check_owner, check_shared

if TYPE_CHECKING:
    from mlvicx_dist.train.step import Member


def train_worker(plan: dict[str, Any]) -> int:
    """Train as one worker of a group; the number of steps done.

    Args:
        plan: `settings`, `run_dir`, `token`, `check_memory`, `judge` and `guard`, as the driver
            wrote them.
    """
    from mlvicx_dist.train.guard import FromRay
    from mlvicx_dist.train.loop import train
    from mlvicx_dist.train.rows import telling

    config = settings_of(plan)
    run_dir = place(plan["run_dir"])
    check_shared(run_dir, plan["token"])
    member = join(config, check_room=plan["check_memory"])
    with telling(plan["guard"], member.rank) as report:
        return train(
            config,
            run_dir,
            member,
            report=report,
            notices=FromRay(plan["guard"], rank=member.rank),
            fence=partial(check_owner, run_dir, plan["token"]),
            judge=plan["judge"](config, member) if plan["judge"] else None,
        )


def settings_of(plan: dict[str, Any]) -> PretrainConfig:
    """The settings that the driver wrote into the plan as a tree."""
    config = parse_config(plan["settings"], "the run's settings")
    assert isinstance(config, PretrainConfig)
    return config


def join(config: PretrainConfig, *, check_room: bool) -> Member:
    """This worker's place in its group, its threads and memory set as the settings say.

    Raises:
        ResourceError: `check_room`, and this node has less memory than the worker needs.
    """
    import ray.train

    from mlvicx_dist.train.memory import check_memory

    member = member_of(config.workers)
    if check_room:
        here = ray.train.get_context().get_local_world_size()
        check_memory(config, member.world_size, node_workers=here, where="a node")
    return member


def member_of(workers: Workers) -> Member:
    """This worker's place in its group, its threads and memory set as the settings say."""
    import ray.train.torch
    import torch

    from mlvicx_dist.train.allocator import keep_freed_memory
    from mlvicx_dist.train.step import Member

    torch.set_num_threads(workers.cpus_per_worker)
    if not workers.use_gpu:
        keep_freed_memory()
    context = ray.train.get_context()
    return Member(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
