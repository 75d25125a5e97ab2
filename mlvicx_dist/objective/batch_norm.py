"""Batch norm over the global batch, the same on one process and on many (DESIGN 3.4).

Its backward carries what the rows of one rank owe to the statistics of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from mlvicx_dist.objective.global_batch import summed, world_size

PIECE_ROWS = 2048
"""Rows of a map, its places, that one call sums up."""


def convert_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Let every batch norm of a model normalise over the global batch; state keys stay.

    SyncBatchNorm on CUDA. It refuses CPU tensors: there the class of each norm is extended in
    place, which keeps what timm's norms with an activation do after the norm.
    """
    if device.type == "cuda":
        # timm makes new modules without the hooks of the old ones: a gate may sit on a norm.
        hooks = {n: m._forward_hooks for n, m in model.named_modules() if m._forward_hooks}
        converted: nn.Module = convert_sync_batchnorm(model)
        for name, own in hooks.items():
            converted.get_submodule(name)._forward_hooks = own
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
        pieces = _pieces(x)
        found = [torch.batch_norm_update_stats(p, unused, unused.clone(), 0.0) for p in pieces]
        means, variances = (torch.stack(kind) for kind in zip(*found, strict=True))
        counts = means.new_tensor([[p.numel() / p.shape[1]] for p in pieces])
        mean, variance, count = _of_all_ranks(*_merged(means, variances, counts))
        y = functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)
        ctx.eps = eps
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return y, mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, variance, count = ctx.saved_tensors
        dy = gradients[0]
        if dy.stride() != x.stride():
            dy = torch.empty_like(x).copy_(dy)
        # The sums of dy (x - m) / std and of dy, without the dx of which they are a part.
        found = [
            torch.ops.aten.native_batch_norm_backward(
                *(d, p, weight, mean, variance, None, None, False, ctx.eps, [False, True, True])
            )[1:]
            for d, p in zip(_pieces(dy), _pieces(x), strict=True)
        ]
        weight_gradient, bias_gradient = (torch.stack(k).sum(0) for k in zip(*found, strict=True))
        sums = summed(torch.stack([weight_gradient, bias_gradient]))
        # dx = w / std (dy - mean of dy - (x - m) / std mean of dy (x - m) / std): affine in both.
        scale = weight * (variance + ctx.eps).rsqrt()
        slope, offset = -scale / count * sums
        dx = functional.batch_norm(x, mean, variance, slope, offset, False, 0.0, ctx.eps)
        if dy.dtype == scale.dtype:
            dx.addcmul_(dy, scale.view(-1, *[1] * (x.ndim - 2)))
        else:
            # addcmul_ would write the map anew in float32.
            none, one = torch.zeros_like(scale), torch.ones_like(scale)
            dx += functional.batch_norm(dy, none, one, scale, None, False, 0.0, 0.0)
        return dx, weight_gradient, bias_gradient, None


def _pieces(x: torch.Tensor) -> Sequence[torch.Tensor]:
    """A map in pieces whose sums are accurate in float32.

    In the layout channels_last PyTorch's kernels add up one number after the other: at 16 images of
    112 px a variance is wrong by 6e-5, in pieces by 1e-7. The other layout's add up in float64.
    """
    if x.ndim != 4 or x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return [x]
    rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    return [piece.T[None, :, :, None] for piece in rows.split(PIECE_ROWS)]


def _merged(
    means: torch.Tensor, variances: torch.Tensor, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean and biased variance [C] and count [1] of several parts, from theirs, [K, C], [K, 1]."""
    total = counts.sum(0)
    mean = (means * counts).sum(0) / total
    return mean, ((variances + (means - mean) ** 2) * counts).sum(0) / total, total


def _of_all_ranks(
    mean: torch.Tensor, variance: torch.Tensor, count: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, biased variance and count of the global batch from those of each rank."""
    if world_size() == 1:
        return mean, variance, count
    own = torch.cat([mean, variance, count])
    parts = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(parts, own)
    return _merged(*torch.stack(parts).split([len(mean), len(mean), 1], 1))
