"""Batch norm over the global batch, the same on one process and on many (DESIGN 3.4).

Its backward carries what the rows of one rank owe to the statistics of another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from mlvicx_dist.model.turns import rest
from mlvicx_dist.objective.global_batch import world_size

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
        norm = _Norm(self.weight, self.eps)
        x = _InputGradient.apply(x, norm)
        norm.begin(x.detach())
        rest()
        norm.settle()
        self._track(norm.mean, norm.variance * (norm.count / (norm.count - 1)))
        y = _Normalised.apply(x, self.weight, self.bias, norm)
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


class _Norm:
    """One forward and backward of a norm, each in two halves with an exchange between them.

    The halves of backward are two nodes of the graph, so that others may run between them. The
    passes over the map are PyTorch's own kernels; they take bf16 maps and keep float32 sums.

    Attributes:
        mean: Of the global batch, [C].
        variance: The biased one, [C].
        count: Values of a channel in the global batch, [1].
    """

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps
        self._sent: Callable[[], list[torch.Tensor]]
        self._sums: Callable[[], torch.Tensor]

    def begin(self, x: torch.Tensor) -> None:
        """Send this rank's statistics of a map off."""
        # Running statistics of the weight's type make the kernel answer in that type.
        unused = torch.zeros_like(self.weight)
        pieces = _pieces(x)
        found = [torch.batch_norm_update_stats(p, unused, unused.clone(), 0.0) for p in pieces]
        means, variances = (torch.stack(kind) for kind in zip(*found, strict=True))
        counts = means.new_tensor([[p.numel() / p.shape[1]] for p in pieces])
        self._sent = _gather_begun(torch.cat(_merged(means, variances, counts)))

    def settle(self) -> None:
        """Wait for those of all ranks."""
        parts = torch.stack(self._sent())
        width = len(self.weight)
        self.mean, self.variance, self.count = _merged(*parts.split([width, width, 1], 1))

    def begin_backward(self, x: torch.Tensor, dy: torch.Tensor) -> Sequence[torch.Tensor]:
        """Send this rank's part of what dx needs off: the gradients of weight and bias."""
        # The sums of dy (x - m) / std and of dy, without the dx of which they are a part.
        found = [
            torch.ops.aten.native_batch_norm_backward(
                *(d, p, self.weight, self.mean, self.variance, None, None, False, self.eps),
                [False, True, True],
            )[1:]
            for d, p in zip(_pieces(dy), _pieces(x), strict=True)
        ]
        gradients = [torch.stack(kind).sum(0) for kind in zip(*found, strict=True)]
        self._sums = _sum_begun(torch.stack(gradients))
        return gradients

    def settle_backward(self, x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        """Wait for the sums of all ranks: dx."""
        # dx = w / std (dy - mean of dy - (x - m) / std mean of dy (x - m) / std): affine in both.
        scale = self.weight * (self.variance + self.eps).rsqrt()
        slope, offset = -scale / self.count * self._sums()
        dx = functional.batch_norm(x, self.mean, self.variance, slope, offset, False, 0.0, self.eps)
        if dy.dtype == scale.dtype:
            dx.addcmul_(dy, scale.view(-1, *[1] * (x.ndim - 2)))
        else:
            # addcmul_ would write the map anew in float32.
            none, one = torch.zeros_like(scale), torch.ones_like(scale)
            dx += functional.batch_norm(dy, none, one, scale, None, False, 0.0, 0.0)
        return dx


class _InputGradient(torch.autograd.Function):
    """The map as it is; the second half of backward, which answers with dx."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, norm: _Norm) -> torch.Tensor:
        ctx.norm = norm
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return ctx.norm.settle_backward(x, dy), None


class _Normalised(torch.autograd.Function):
    """The normalised map; the first half of backward, which hands dy on."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, norm: _Norm
    ) -> torch.Tensor:
        ctx.norm = norm
        ctx.save_for_backward(x)
        return functional.batch_norm(
            x, norm.mean, norm.variance, weight, bias, False, 0.0, norm.eps
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if dy.stride() != x.stride():
            dy = torch.empty_like(x).copy_(dy)
        return dy, *ctx.norm.begin_backward(x, dy), None


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


def _gather_begun(own: torch.Tensor) -> Callable[[], list[torch.Tensor]]:
    """Send a tensor to all ranks; what is called for theirs waits for them."""
    parts = [own if world_size() == 1 else torch.empty_like(own) for _ in range(world_size())]
    work = dist.all_gather(parts, own, async_op=True) if world_size() > 1 else None

    def waited() -> list[torch.Tensor]:
        if work:
            work.wait()
        return parts

    return waited


def _sum_begun(own: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The same for the sum over ranks, of a tensor that is not needed again."""
    work = dist.all_reduce(own, async_op=True) if world_size() > 1 else None

    def waited() -> torch.Tensor:
        if work:
            work.wait()
        return own

    return waited
