"""What a worker's loader and its steps do, measured for a second or two without a run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from mlvicx_dist.config import PretrainConfig
from mlvicx_dist.errors import UserError
from mlvicx_dist.stream.augment import PARAMETERS
from mlvicx_dist.stream.loader import Batch
from mlvicx_dist.stream.shardset import ShardSet
from mlvicx_dist.train.optim import make_optimizer
from mlvicx_dist.train.source import steps_of
from mlvicx_dist.train.step import Member, TwoViews, make_model, random_model, train_step

LOADING_S = 1.0
LOADED = 64
"""Images that are loaded at a time, at most."""


def loader_rate(config: PretrainConfig, shards: ShardSet) -> float:
    """Images/s that one loader process makes of the shards, as two views each.

    Raises:
        UserError: a shard cannot be read, or the batch is larger than the data.
    """
    workers = max(config.workers.num, math.ceil(config.train.batch_size / LOADED))
    steps = steps_of(config, shards, Member(0, workers, torch.device("cpu")))
    step, count, began = 0, 0, time.perf_counter()
    while not count or time.perf_counter() - began < LOADING_S:
        batch = steps[step % steps.steps_per_epoch]
        if isinstance(batch, UserError):
            raise batch
        step, count = step + 1, count + batch.images.shape[1]
    return count / (time.perf_counter() - began)


def training_step(config: PretrainConfig, rows: int, device: torch.device) -> Callable[[], None]:
    """A training step on noise, of one worker that has the whole batch, to be called again.

    Args:
        config: The settings; their batch does not count.
        rows: Images of each view.
        device: Where it runs; on a GPU a call returns before the step is done.
    """
    train = config.train.model_copy(update={"batch_size": rows, "init_from": None})
    settings, member = random_model(config), Member(0, 1, device)
    alone = config.model_copy(update={"train": train, "model": settings})
    model = make_model(alone, member)
    views, optimizer = TwoViews(model), make_optimizer(model, train)
    size = config.views.image_size_px
    # All parameters 1: no brightness, and each view blurred by a pixel and solarised.
    batch = Batch(
        0,
        torch.zeros(rows),
        torch.randint(0, 255, (2, rows, 1, size, size), dtype=torch.uint8),
        torch.ones(2, rows, len(PARAMETERS)),
        torch.zeros(rows, len(settings.classes or ())),
    )

    def step() -> None:
        train_step(views, optimizer, batch, 1e-6, alone, member)

    return step
