"""The training loop of one worker, top to bottom: views, embeddings, loss, step, log, checkpoint.

It knows its rank and its device, not Ray: `launch` gives it its place. All state is the model, the
optimizer and the step; the data and the schedule are functions of the step (DESIGN 3.1, 5).
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mlvicx_dist.config import Loss, PretrainConfig, VicWeights, to_tree
from mlvicx_dist.errors import CheckpointError, TrainingError
from mlvicx_dist.model.encoder import Encoder, load_strictly, normalise, save_export
from mlvicx_dist.model.mlvicx import MLVICX, build_model
from mlvicx_dist.objective.global_batch import (
    convert_batch_norm,
    ddp_scale,
    global_terms,
    weighted_loss,
)
from mlvicx_dist.objective.terms import Terms
from mlvicx_dist.stream.augment import photometrics
from mlvicx_dist.stream.loader import Batch, Steps, batches
from mlvicx_dist.stream.order import rank_shares
from mlvicx_dist.stream.shardset import ShardSet
from mlvicx_dist.train.checkpoint import (
    load_encoder,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from mlvicx_dist.train.metrics import Meter, RunLog
from mlvicx_dist.train.optim import learning_rate, make_optimizer
from mlvicx_dist.train.versions import library_versions

log = logging.getLogger(__name__)

Row = dict[str, float]


@dataclass(frozen=True)
class Place:
    """Where a worker stands in its group."""

    rank: int
    world_size: int
    device: torch.device


class TwoViews(nn.Module):
    """Both views through one model in one call, as DDP wants it.

    Two forwards, view 1 first: batch statistics are per view and running ones move twice a step
    (DESIGN 4.1).
    """

    def __init__(self, model: MLVICX) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, first: torch.Tensor, second: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
        """The embeddings of both views and view 1's representation without gradient, [b, F]."""
        maps = self.model.encoder(first)
        representation = self.model.representation(maps).detach()
        return self.model.project(maps), self.model(second), representation


def train(
    config: PretrainConfig, run_dir: Path, place: Place, *, report: Callable[[Row], None]
) -> int:
    """Train from the newest whole checkpoint of `run_dir`, or from the start, to the last step.

    Args:
        config: The settings.
        run_dir: Folder of the run, which all workers see.
        place: This worker's rank, the world size and its device.
        report: Called on every rank with each log row.

    Returns:
        The number of steps done.

    Raises:
        UserError: a shard cannot be read, or the loss is not finite.
    """
    _seed_everything(config)
    data = config.data
    shards = ShardSet.open(
        [folder.path for folder in data.shards],
        splits=data.splits,
        weights=[folder.weight for folder in data.shards],
    )
    steps = Steps(
        shards,
        config.views,
        batch=config.train.batch_size,
        seed=config.train.seed,
        rank=place.rank,
        world_size=place.world_size,
    )
    total = steps.steps_per_epoch * config.train.epochs
    model = _model(config, place)
    optimizer = make_optimizer(model, config.train)
    start = _resume(run_dir, model, optimizer, place)
    wrapped = _wrap(TwoViews(model), place)
    meter = Meter(steps.lanes.stop - steps.lanes.start)
    saver = _Saver(config, run_dir, model, optimizer, shards) if place.rank == 0 else None
    clock = _Clock()
    with RunLog(run_dir, step=start) if place.rank == 0 else nullcontext() as run_log:
        stream = batches(
            steps,
            start=start,
            stop=total,
            workers=data.loader_workers,
            pin_memory=place.device.type == "cuda",
        )
        for batch in clock.waiting(stream):
            rate = learning_rate(
                batch.step, settings=config.train, steps_per_epoch=steps.steps_per_epoch
            )
            terms, representation = train_step(wrapped, optimizer, batch, rate, config, place)
            meter.add(batch.step, terms, representation)
            done = batch.step + 1
            if done % config.train.log_every_steps == 0 or done == total:
                row = {
                    "step": done,
                    "epoch": done / steps.steps_per_epoch,
                    "learning_rate": rate,
                    **meter.row(),
                    **clock.row(done, config.train.batch_size),
                }
                if run_log:
                    run_log.write(row)
                report({**row, "steps": total, "resumed": start})
            if saver and (saver.due(done) or done == total):
                meter.settle()
                saver.save(done, final=done == total)
    return total


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    rate: float,
    config: PretrainConfig,
    place: Place,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """One optimizer step; answers with its terms, scalars by name, and view 1's representation."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    images = batch.images.to(place.device, non_blocking=True)
    table = batch.table.to(place.device, non_blocking=True)
    first, second = (
        normalise(
            photometrics(images[view] / 255, table[view], kernel_px=config.views.blur_kernel_px),
            config.model.channels,
        )
        for view in (0, 1)
    )
    with torch.autocast(
        place.device.type, torch.bfloat16, enabled=config.train.precision == "bf16"
    ):
        embeddings1, embeddings2, representation = model(first, second)
    shares = rank_shares(config.train.batch_size, place.world_size)
    terms, spreads = global_terms(embeddings1, embeddings2, shares=shares)
    loss = weighted_loss(terms, config.loss)
    optimizer.zero_grad(set_to_none=True)
    (loss * ddp_scale()).backward()
    optimizer.step()
    return named_terms(loss, terms, spreads, config.loss), representation


def named_terms(
    loss: torch.Tensor,
    terms: Mapping[str, Terms],
    spreads: Mapping[str, torch.Tensor],
    settings: Loss,
) -> dict[str, torch.Tensor]:
    """The loss, and by level each term unweighted and weighted and the embedding's std."""
    named = {"loss": loss}
    for head, values in terms.items():
        weights = settings.global_ if head == "global" else settings.local
        for term in VicWeights.model_fields:
            value = getattr(values, term)
            named[f"{head}/{term}"] = value
            named[f"{head}/{term}_weighted"] = getattr(weights, term) * value
        named[f"{head}/std"] = spreads[head]
    return named


class _Saver:
    """Writes the checkpoints and exports of a run; rank 0 has one."""

    def __init__(
        self,
        config: PretrainConfig,
        run_dir: Path,
        model: MLVICX,
        optimizer: torch.optim.Optimizer,
        shards: ShardSet,
    ) -> None:
        self.config, self.run_dir, self.model, self.optimizer = config, run_dir, model, optimizer
        self.manifests = shards.digests()
        self._last_s, self._count = time.monotonic(), 0

    def due(self, done: int) -> bool:
        every = self.config.checkpoint
        if every.every_steps and done % every.every_steps == 0:
            return True
        return time.monotonic() - self._last_s >= every.every_s

    def save(self, done: int, *, final: bool) -> None:
        """Save the state after `done` steps; the encoder too, at the end and every so often."""
        if not all(bool(weight.isfinite().all()) for weight in self.model.parameters()):
            raise TrainingError(
                f"step {done}: the weights are not finite, so they are not saved; start again from "
                "the last checkpoint with a lower train.learning_rate_per_256."
            )
        every = self.config.checkpoint
        # The export first: where the last checkpoint stands, its export stands too.
        if final or (every.export_every and (self._count + 1) % every.export_every == 0):
            encoder = Encoder.from_model(self.model, self.config.views.image_size_px)
            folder = self.run_dir / "exports" / f"step-{done:08d}"
            save_export(encoder, folder, {"run": self.config.run.name, "step": done})
        state = {
            "step": done,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "settings": to_tree(self.config),
            "manifests": self.manifests,
            "versions": library_versions(),
        }
        save_checkpoint(self.run_dir, state, keep=every.keep)
        self._last_s, self._count = time.monotonic(), self._count + 1


class _Clock:
    """Where the time of a step goes."""

    def __init__(self) -> None:
        self._start_s = time.monotonic()
        self._row_s, self._wait_s, self._row_step = self._start_s, 0.0, -1

    def waiting(self, stream: Any) -> Any:
        """The stream's batches, with the time spent waiting for them counted."""
        iterator = iter(stream)
        while True:
            begin = time.monotonic()
            batch = next(iterator, None)
            if batch is None:
                return
            if self._row_step < 0:
                # The first batch starts the loader's processes: no step waits for that again.
                self._row_s, self._row_step = time.monotonic(), batch.step
            else:
                self._wait_s += time.monotonic() - begin
            yield batch

    def row(self, done: int, batch_size: int) -> Row:
        """Images a second and the share of the time that waited for data, since the last row."""
        now = time.monotonic()
        elapsed = max(now - self._row_s, 1e-9)
        row = {
            "images_per_s": (done - self._row_step) * batch_size / elapsed,
            "data_wait": self._wait_s / elapsed,
            "time_s": now - self._start_s,
        }
        self._row_s, self._wait_s, self._row_step = now, 0.0, done
        return row


def _seed_everything(config: PretrainConfig) -> None:
    random.seed(config.train.seed)
    np.random.seed(config.train.seed % 2**32)
    torch.manual_seed(config.train.seed)
    torch.use_deterministic_algorithms(config.train.deterministic)
    if not config.train.deterministic:
        torch.backends.cudnn.benchmark = True


def _model(config: PretrainConfig, place: Place) -> MLVICX:
    """The model of the settings on its device, with the weights that it is to start from."""
    model = build_model(config.model, config.train.seed)
    if config.train.init_from:
        source = load_encoder(config.train.init_from)
        if source.settings.backbone != config.model.backbone:
            raise CheckpointError(
                f"{config.train.init_from}: its backbone is {source.settings.backbone}, but "
                f"model.backbone is {config.model.backbone}; make the two agree."
            )
        load_strictly(model.encoder, source.backbone.state_dict(), where=config.train.init_from)
    if place.world_size > 1:
        convert_batch_norm(model, place.device)
    return model.to(place.device)


def _wrap(model: TwoViews, place: Place) -> nn.Module:
    if place.world_size == 1:
        return model
    # Batch norm already belongs to the global batch: its buffers are equal on all ranks.
    return DistributedDataParallel(
        model,
        device_ids=[place.device] if place.device.type == "cuda" else None,
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
    )


def _resume(run_dir: Path, model: MLVICX, optimizer: torch.optim.Optimizer, place: Place) -> int:
    """Load the newest whole checkpoint, the same one on every rank; its step, or 0."""
    found = [newest_checkpoint(run_dir) if place.rank == 0 else None]
    if place.world_size > 1:
        dist.broadcast_object_list(found, src=0)
    path = found[0]
    if path is None:
        return 0
    state = read_checkpoint(path)
    load_strictly(model, state["model"], where=str(path))
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])
