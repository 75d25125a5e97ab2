"""The loss of the global batch, the same number on one process and on many (DESIGN 3.4).

Every rank computes its own rows' part of the loss L and of its gradient: dL/dz_r of its embeddings,
so that the gradient of L is the sum over ranks. DDP averages: `ddp_scale`, the world size, makes
that average the sum. Batch norm belongs to the global batch too; its backward carries what the rows
of one rank owe to the statistics of another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from mlvicx_dist.config import Loss, VicWeights
from mlvicx_dist.objective.terms import EPSILON, Terms


def world_size() -> int:
    """Processes in the group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def ddp_scale() -> int:
    """What the loss is multiplied by before backward, since DDP averages over ranks."""
    return world_size()


def global_terms(
    first: Mapping[str, torch.Tensor],
    second: Mapping[str, torch.Tensor],
    *,
    shares: Sequence[int] | None = None,
) -> tuple[dict[str, Terms], dict[str, torch.Tensor]]:
    """The terms of every head over the global batch, as `vic_terms` defines them.

    Three collectives for all heads and both views together, and one more where a head has N >= D.
    The work on matrix products falls as 1/W.

    Args:
        first: Embeddings of view 1 by head, [n_r, D_h] each.
        second: The same of view 2.
        shares: Rows of each rank; None: they are asked for, which waits for the device.

    Returns:
        The terms by head, equal on all ranks, whose backward is dL/dz_r; and by head the mean
        standard deviation of view 1's embeddings, without gradient.
    """
    names = list(first)
    pieces = [x for name in names for x in (first[name], second[name])]
    device = pieces[0].device.type
    with torch.autocast(device, enabled=False):
        wide = [x if x.dtype == torch.float64 else x.float() for x in pieces]
        rows = torch.cat(wide, 1)
        shares = shares or _asked_shares(rows)
        widths = tuple(x.shape[1] for x in wide)
        values: list[torch.Tensor] = list(_GlobalTerms.apply(rows, widths, tuple(shares)))
    terms = {
        name: Terms(
            invariance=values[3 * k], variance=values[3 * k + 1], covariance=values[3 * k + 2]
        )
        for k, name in enumerate(names)
    }
    return terms, dict(zip(names, values[3 * len(names) :], strict=True))


def _asked_shares(rows: torch.Tensor) -> list[int]:
    """How many rows each rank has."""
    if world_size() == 1:
        return [len(rows)]
    counts = torch.zeros(world_size(), dtype=torch.int64, device=rows.device)
    counts[dist.get_rank()] = len(rows)
    dist.all_reduce(counts)
    found: list[int] = counts.tolist()
    return found


class _GlobalTerms(torch.autograd.Function):
    """DESIGN 3.4 for pairs of pieces: view 1 and view 2 of each head, beside each other.

    With Z the centred N x D batch of a piece: where N < D the rows are gathered once and each rank
    takes its own rows of Z Z'; else the D x D products are all-reduced. The gradients by centred
    rows have no column mean, so that centring needs no backward.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, widths: tuple[int, ...], shares: tuple[int, ...]
    ) -> tuple[torch.Tensor, ...]:
        count = sum(shares)
        if count < 2 or any(a != b for a, b in zip(widths[::2], widths[1::2], strict=True)):
            raise ValueError(f"two [N, D] with N >= 2 are needed, not widths {widths}, N {count}")
        mean = _summed(rows.sum(0)) / count
        centred = rows - mean
        own = centred.split(widths, 1)
        gathered = _gathered_narrow(own, shares)
        # Each piece's own part of ||Z Z'||^2, and what its gradient needs: z_r Z' or C.
        products, norms = [], []
        for z, whole in zip(own, gathered, strict=True):
            if whole is None:
                product = _summed(z.T @ z) / (count - 1)
                norms.append(product.square().sum() * (count - 1) ** 2 / world_size())
            else:
                product = z @ whole.T
                norms.append(product.square().sum())
            products.append(product)
        raw = rows.split(widths, 1)
        apart = [(a - b).square().sum() for a, b in zip(raw[::2], raw[1::2], strict=True)]
        sums = _summed(torch.cat([centred.square().sum(0), torch.stack([*norms, *apart])]))
        squares, norm, distance = sums.split([rows.shape[1], len(widths), len(apart)])
        variances = squares / (count - 1)
        deviations = (variances + EPSILON).sqrt()
        ctx.save_for_backward(
            rows, centred, variances, deviations, *products, *(g for g in gathered if g is not None)
        )
        ctx.widths, ctx.count = widths, count
        ctx.narrow = [whole is not None for whole in gathered]
        hinges, penalties, spreads = [], [], []
        for variance, deviation, n in zip(
            variances.split(widths), deviations.split(widths), norm.unbind(), strict=True
        ):
            hinges.append(torch.relu(1 - deviation).mean())
            penalties.append((n / (count - 1) ** 2 - variance.square().sum()) / len(variance))
            spreads.append(variance.sqrt().mean())
        terms = [
            term
            for k, width in enumerate(widths[::2])
            for term in (
                distance[k] / (count * width),
                (hinges[2 * k] + hinges[2 * k + 1]) / 2,
                penalties[2 * k] + penalties[2 * k + 1],
            )
        ]
        ctx.mark_non_differentiable(*spreads[::2])
        return (*terms, *spreads[::2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, centred, variances, deviations, *rest = ctx.saved_tensors
        widths, count = ctx.widths, ctx.count
        products, wholes = rest[: len(widths)], iter(rest[len(widths) :])
        raw, own = rows.split(widths, 1), centred.split(widths, 1)
        found = []
        per_piece = zip(
            own, variances.split(widths), deviations.split(widths), products, strict=True
        )
        for k, (z, variance, deviation, product) in enumerate(per_piece):
            invariance, hinge, penalty = gradients[3 * (k // 2) : 3 * (k // 2) + 3]
            width = len(variance)
            apart = raw[k] - raw[k ^ 1]
            # The variance term is the mean of two hinges, the covariance term the sum of two.
            slope = (deviation < 1) / deviation * (-hinge / 2 / (width * (count - 1)))
            bend = -4 * penalty / (width * (count - 1)) * variance
            if ctx.narrow[k]:
                spread = (4 * penalty / (width * (count - 1) ** 2)) * (product @ next(wholes))
            else:
                spread = (4 * penalty / (width * (count - 1))) * (z @ product)
            found.append(apart * (2 * invariance / (count * width)) + z * (slope + bend) + spread)
        return torch.cat(found, 1), None, None


def _summed(x: torch.Tensor) -> torch.Tensor:
    """The sum over ranks."""
    if world_size() > 1:
        x = x.contiguous()
        dist.all_reduce(x)
    return x


def _gathered_narrow(
    own: Sequence[torch.Tensor], shares: tuple[int, ...]
) -> list[torch.Tensor | None]:
    """The rows of all ranks, of each piece with N < D, in one gather; None of the others."""
    narrow = [z for z in own if sum(shares) < z.shape[1]]
    if world_size() == 1 or not narrow:
        return [z if sum(shares) < z.shape[1] else None for z in own]
    whole = torch.cat(gathered(torch.cat(narrow, 1), shares))
    pieces = iter(whole.split([z.shape[1] for z in narrow], 1))
    return [next(pieces) if sum(shares) < z.shape[1] else None for z in own]


def gathered(mine: torch.Tensor, shares: Sequence[int]) -> list[torch.Tensor]:
    """The rows of each rank, [n_r, D], without gradient; a rank may have more than another."""
    padded = mine.new_zeros(max(shares), mine.shape[1])
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in shares]
    dist.all_gather(parts, padded)
    return [part[:share] for part, share in zip(parts, shares, strict=True)]


def weighted_loss(terms: Mapping[str, Terms], settings: Loss) -> torch.Tensor:
    """L = VIC(global) + lambda * VIC(local); of several local vectors the weighted mean."""
    total = _weighted(terms["global"], settings.global_)
    factors = {f"level{level}": weight for level, weight in settings.level_weights.items()}
    local = [
        factors.get(name, 1.0) * _weighted(t, settings.local)
        for name, t in terms.items()
        if name != "global"
    ]
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
        sums = _summed(torch.stack([weight_gradient, bias_gradient]))
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


PIECE_ROWS = 2048
"""Rows of a map, its places, that one call sums up."""


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
