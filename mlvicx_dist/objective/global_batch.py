"""The loss of the global batch, the same number on one process and on many (DESIGN 3.4).

Every rank computes its own rows' part of the loss L and of its gradient: dL/dz_r of its embeddings,
so that the gradient of L is the sum over ranks. DDP averages: `ddp_scale`, the world size, makes
that average the sum. Batch norm belongs to the global batch too: `batch_norm`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

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

    Three collectives for all heads and both views together; for each head with N >= D two more, one
    a view, and no gather where all heads are so. The work on matrix products falls as 1/W.

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
        mean = summed(rows.sum(0)) / count
        centred = rows - mean
        own = centred.split(widths, 1)
        gathered = _gathered_narrow(own, shares)
        # Each piece's own part of ||Z Z'||^2, and what its gradient needs: z_r Z' or C.
        products, norms = [], []
        for z, whole in zip(own, gathered, strict=True):
            if whole is None:
                product = summed(z.T @ z) / (count - 1)
                norms.append(product.square().sum() * (count - 1) ** 2 / world_size())
            else:
                product = z @ whole.T
                norms.append(product.square().sum())
            products.append(product)
        raw = rows.split(widths, 1)
        apart = [(a - b).square().sum() for a, b in zip(raw[::2], raw[1::2], strict=True)]
        sums = summed(torch.cat([centred.square().sum(0), torch.stack([*norms, *apart])]))
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


def summed(x: torch.Tensor) -> torch.Tensor:
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
    return gather_begun(mine, shares)()


def gather_begun(mine: torch.Tensor, shares: Sequence[int]) -> Callable[[], list[torch.Tensor]]:
    """Begin to gather: what is returned, when it is called, waits for the rows and gives them."""
    if len(shares) == 1:
        return lambda: [mine]
    padded = mine.new_zeros(max(shares), mine.shape[1])
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in shares]
    work = dist.all_gather(parts, padded, async_op=True)

    def waited() -> list[torch.Tensor]:
        work.wait()
        return [part[:share] for part, share in zip(parts, shares, strict=True)]

    return waited


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
