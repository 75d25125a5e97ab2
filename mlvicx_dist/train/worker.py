"""What each Ray Train worker runs: its place in the group, then the loop."""

from __future__ import annotations

from typing import Any

from mlvicx_dist.config import PretrainConfig, parse_config
from mlvicx_dist.errors import DataError
from mlvicx_dist.storage import Place, place, reaching

TOKEN = ".driver-{}"
"""A file that the driver puts into the run's folder: who does not see it has another disk."""


def train_worker(plan: dict[str, Any]) -> int:
    """Train as one worker of a group; the number of steps done.

    Args:
        plan: `settings`, `run_dir`, `token` and `guard`, as the driver wrote them.
    """
    import ray.train
    import ray.train.torch
    import torch

    from mlvicx_dist.train.guard import FromRay
    from mlvicx_dist.train.loop import Member, train

    config = parse_config(plan["settings"], "the run's settings")
    assert isinstance(config, PretrainConfig)
    run_dir = place(plan["run_dir"])
    _check_shared(run_dir, plan["token"])
    torch.set_num_threads(config.workers.cpus_per_worker)
    context = ray.train.get_context()
    rank = context.get_world_rank()
    member = Member(rank, context.get_world_size(), ray.train.torch.get_device())
    notices = FromRay(plan["guard"], rank=rank)
    return train(config, run_dir, member, report=ray.train.report, notices=notices)


def _check_shared(run_dir: Place, token: str) -> None:
    try:
        with reaching(run_dir):
            seen = (run_dir / TOKEN.format(token)).exists()
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
