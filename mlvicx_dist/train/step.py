"""One step of one worker: the model, its place in the group, and what happens to a batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from mlvicx_dist.config import (
    NUMBER_BYTES,
    SUPERVISED,
    Loss,
    Model,
    PretrainConfig,
    Train,
    VicWeights,
)
from mlvicx_dist.errors import CheckpointError
from mlvicx_dist.model.encoder import load_strictly, normalise
from mlvicx_dist.model.mlvicx import MLVICX, build_model
from mlvicx_dist.objective.baselines import FROM_LIBRARY, baseline_loss
from mlvicx_dist.objective.batch_norm import convert_batch_norm
from mlvicx_dist.objective.global_batch import (
    ddp_scale,
    global_terms,
    weighted_loss,
)
from mlvicx_dist.objective.labels import label_loss
from mlvicx_dist.objective.terms import Terms
from mlvicx_dist.objective.wide_linear import align, gather_rows, gathered_weights, wide_layers
from mlvicx_dist.stream.augment import photometrics
from mlvicx_dist.stream.loader import Batch
from mlvicx_dist.stream.order import rank_shares
from mlvicx_dist.train.weights import load_encoder

Part = Callable[[str], AbstractContextManager[Any]]
"""From the name of a part of a step to a block around it."""


@dataclass(frozen=True)
class Member:
    """One worker of a group: its rank, the size of the group and its device."""

    rank: int
    world_size: int
    device: torch.device


def prepare_process(config: PretrainConfig) -> None:
    """Before the model is made: seeds, and which kernels PyTorch may choose."""
    random.seed(config.train.seed)
    np.random.seed(config.train.seed % 2**32)
    torch.manual_seed(config.train.seed)
    torch.use_deterministic_algorithms(config.train.deterministic)
    if not config.train.deterministic:
        torch.backends.cudnn.benchmark = True


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
        maps = self.model.encoder(first), self.model.encoder(second)
        embeddings1, embeddings2 = self.model.project(*maps)
        return embeddings1, embeddings2, self.model.representation(maps[0]).detach()


def random_model(config: PretrainConfig) -> Model:
    """Settings of the model with random weights, whatever the run's begin with.

    Where a training on labels has not been told its classes yet it has one, which takes no other
    time or memory to speak of.
    """
    change: dict[str, Any] = {"init": "random"}
    if config.method == SUPERVISED and not config.model.classes:
        change["classes"] = ["one"]
    return config.model.model_copy(update=change)


def make_model(config: PretrainConfig, member: Member) -> MLVICX:
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
    if config.train.recompute:
        model.encoder.recompute()
    # On a CPU a single worker too: PyTorch's own is no faster, and less exact in channels_last.
    if member.world_size > 1 or member.device.type == "cpu":
        convert_batch_norm(model, member.device)
    return model.to(member.device)


def gathered_layers(model: MLVICX, settings: Train) -> list[nn.Linear]:
    """The layers of which a group exchanges rows, two for each image, in place of gradients."""
    if not settings.gather_rows:
        return []
    rows = 2 * settings.batch_size
    return [layer for head in model.heads for layer in wide_layers(head, rows)]


def bytes_of_rows(layers: Sequence[nn.Linear], settings: Train) -> int:
    """What such layers gather at a step: inputs and gradients of outputs of the global batch."""
    numbers = sum(layer.in_features + layer.out_features for layer in layers)
    return NUMBER_BYTES[settings.precision] * 2 * settings.batch_size * numbers


def wrap(model: nn.Module, member: Member, settings: Train) -> nn.Module:
    """The model as a worker of a group calls it."""
    if member.world_size == 1:
        return model
    layers = gathered_layers(model.model, settings) if isinstance(model, TwoViews) else []
    if layers:
        shares = rank_shares(settings.batch_size, member.world_size)
        gather_rows(layers, [2 * share for share in shares])
        align(model)
        # There is no public way to leave a parameter out of the all-reduce.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            model, list(gathered_weights(model))
        )
    # Batch norm already belongs to the global batch: its buffers are equal on all ranks. DDP orders
    # its buckets anew after the first step, which moves sums by a rounding: not if it looks for
    # unused parameters, so a run that must be bitwise repeatable has it look.
    wrapped = DistributedDataParallel(
        model,
        device_ids=[member.device] if member.device.type == "cuda" else None,
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
        find_unused_parameters=settings.deterministic,
    )
    if settings.gradients == "bf16":
        wrapped.register_comm_hook(None, bf16_compress_hook)
    return wrapped


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    rate: float,
    config: PretrainConfig,
    member: Member,
    part: Part = record_function,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """One optimizer step; answers with its terms, scalars by name, and view 1's representation.

    `part` is entered around each part of the step with its name, one after the other; as it is
    given, each is a span in a trace of torch.profiler.
    """
    with part("transfer"):
        images = batch.images.to(member.device, non_blocking=True)
        labels = batch.labels
        if labels is not None:
            labels = labels.to(member.device, non_blocking=True)
    with part("augment"):
        kernel_px, channels = config.views.blur_kernel_px, config.model.channels
        first, second = (
            normalise(photometrics(view, values, kernel_px=kernel_px), channels)
            for view, values in zip(images, batch.table, strict=True)
        )
    precision = torch.autocast(
        member.device.type, torch.bfloat16, enabled=config.train.precision == "bf16"
    )
    with part("forward"), precision:
        embeddings1, embeddings2, representation = model(first, second)
    with part("loss"):
        shares = rank_shares(config.train.batch_size, member.world_size)
        named = loss_of(config, embeddings1, embeddings2, shares, labels)
    with part("backward"):
        optimizer.zero_grad(set_to_none=True)
        (named["loss"] * ddp_scale()).backward()
    with part("optimizer"):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return named, representation


def loss_of(
    config: PretrainConfig,
    first: Mapping[str, torch.Tensor],
    second: Mapping[str, torch.Tensor],
    shares: Sequence[int],
    labels: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The `loss` of the method over the global batch, whose backward is dL/dz_r, and its terms."""
    if config.method == SUPERVISED:
        assert labels is not None
        logits = torch.cat([first["global"], second["global"]])
        return {"loss": label_loss(logits, torch.cat([labels, labels]))}
    if config.method in FROM_LIBRARY:
        loss, spread = baseline_loss(config.method, first, second, config.loss, shares=shares)
        return {"loss": loss, "global/std": spread}
    terms, spreads = global_terms(first, second, shares=shares)
    return named_terms(weighted_loss(terms, config.loss), terms, spreads, config.loss)


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
