"""The loss of the global batch, the same number on one process and on many (DESIGN 3.4).

Every rank gathers all embeddings and computes the whole loss L. Only its own rows carry gradient,
so backward gives rank r its share dL/dz_r * dz_r/dw, and the gradient of L is the sum over ranks.
DDP averages: `ddp_scale`, the world size, makes that average the sum. Batch norm belongs to the
global batch too; its backward carries what the rows of one rank owe to the statistics of another.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from mlvicx_dist.config import Loss, VicWeights
from mlvicx_dist.objective.terms import Terms, vic_terms


def world_size() -> int:
    """Processes in the group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def ddp_scale() -> int:
    """What the loss is multiplied by before backward, since DDP averages over ranks."""
    return world_size()


def gather_batch(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks in rank order; only this rank's own carry gradient.

    Args:
        rows: [n_r, K]; n_r may differ between ranks.

    Returns:
        [sum of n_r, K].
    """
    if world_size() == 1:
        return rows
    counts = torch.zeros(world_size(), dtype=torch.int64, device=rows.device)
    counts[dist.get_rank()] = len(rows)
    dist.all_reduce(counts)
    sizes = counts.tolist()
    padded = rows.detach().new_zeros(max(sizes), rows.shape[1])
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    parts = [part[:size] for part, size in zip(parts, sizes, strict=True)]
    parts[dist.get_rank()] = rows
    return torch.cat(parts)


def global_terms(
    first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]
) -> dict[str, Terms]:
    """The terms of every head over the global batch; one gather for all heads and both views.

    Args:
        first: Embeddings of view 1 by head, [n_r, D_h] each.
        second: The same of view 2.
    """
    names = list(first)
    pieces = [x for name in names for x in (first[name], second[name])]
    if world_size() > 1:
        # At least float32 before the wire: the terms are computed so anyway.
        wide = [x if x.dtype == torch.float64 else x.float() for x in pieces]
        pieces = list(gather_batch(torch.cat(wide, 1)).split([x.shape[1] for x in wide], 1))
    return {
        name: vic_terms(a, b) for name, a, b in zip(names, pieces[::2], pieces[1::2], strict=True)
    }


def weighted_loss(terms: Mapping[str, Terms], settings: Loss) -> torch.Tensor:
    """L = VIC(global) + lambda * VIC(local); several local vectors are averaged."""
    total = _weighted(terms["global"], settings.global_)
    local = [_weighted(t, settings.local) for name, t in terms.items() if name != "global"]
    if local:
        total = total + settings.lambda_local * torch.stack(local).mean()
    return total


def _weighted(terms: Terms, weights: VicWeights) -> torch.Tensor:
    return (
        weights.invariance * terms.invariance
        + weights.variance * terms.variance
        + weights.covariance * terms.covariance
    )


def convert_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Let every batch norm of a model normalise over the global batch; state keys stay.

    SyncBatchNorm on CUDA. It refuses CPU tensors: there the class of each norm is extended in
    place, which keeps what timm's norms with an activation do after the norm.
    """
    if device.type == "cuda":
        converted: nn.Module = convert_sync_batchnorm(model)
        return converted
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, _GlobalStatistics):
            kind: Any = type(module)
            module.__class__ = _extended(kind)
    return model


@cache
def _extended(kind: Any) -> Any:
    return type(f"Global{kind.__name__}", (_GlobalStatistics, kind), {})


class _GlobalStatistics(_BatchNorm):
    """Batch norm whose statistics are those of the global batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        y, mean, variance, count = _GlobalNorm.apply(x, self.weight, self.bias, self.eps)
        self._track(mean, variance * (count / (count - 1)))
        for name in ("drop", "act"):
            after = getattr(self, name, None)
            y = after(y) if isinstance(after, nn.Module) else y
        return y

    @torch.no_grad()
    def _track(self, mean: torch.Tensor, unbiased: torch.Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:
            assert self.num_batches_tracked is not None
            momentum = 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        self.running_var.lerp_(unbiased.to(self.running_var), momentum)


class _GlobalNorm(torch.autograd.Function):
    """Normalisation by the global batch: one collective forward, one backward.

    The passes over the map are PyTorch's own kernels; they take bf16 maps and keep float32 sums.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        # Running statistics of the weight's type make the kernel answer in that type.
        unused = torch.zeros_like(weight)
        mean, variance = torch.batch_norm_update_stats(x, unused, unused.clone(), 0.0)
        mean, variance, count = _merged(mean, variance, x.numel() // x.shape[1])
        y = functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)
        ctx.eps = eps
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return y, mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, variance, count = ctx.saved_tensors
        # As if the statistics were constants: dx = dy w / std, and the sums of dy and dy (x-m)/std.
        dx, weight_gradient, bias_gradient = torch.ops.aten.native_batch_norm_backward(
            gradients[0].contiguous(),
            x,
            weight,
            mean,
            variance,
            None,
            None,
            False,
            ctx.eps,
            [True, True, True],
        )
        sums = torch.stack([weight_gradient, bias_gradient])
        if world_size() > 1:
            dist.all_reduce(sums)
        # What x owes through the statistics is affine in its normalised value.
        scale = -weight * (variance + ctx.eps).rsqrt() / count
        slope, offset = scale * sums
        dx += functional.batch_norm(x, mean, variance, slope, offset, False, 0.0, ctx.eps)
        return dx, weight_gradient, bias_gradient, None


def _merged(
    mean: torch.Tensor, variance: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, biased variance and count of the global batch from those of each rank."""
    own = torch.cat([mean, variance, mean.new_tensor([count])])
    parts = [torch.empty_like(own) for _ in range(world_size())]
    if len(parts) == 1:
        return mean, variance, own[-1]
    dist.all_gather(parts, own)
    means, variances, counts = torch.stack(parts).split([len(mean), len(mean), 1], 1)
    total = counts.sum()
    mean = (means * counts).sum(0) / total
    return mean, ((variances + (means - mean) ** 2) * counts).sum(0) / total, total
