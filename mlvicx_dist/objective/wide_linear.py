"""Gradients of wide linear layers from the rows of the global batch, not by an all-reduce.

dW = sum over ranks of dY_r' X_r / W, [out, in] (the mean, as DDP takes it). Of the default's
projectors that is nine tenths of what workers exchange at a step, yet a product of two matrices
whose rows are the batch's views: where these are fewer numbers, they are gathered, and each rank
computes the whole product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mlvicx_dist.objective.global_batch import gather_begun

SAVING = 4
"""How many times fewer than the weights the rows' numbers must be: the product is done W times."""


def wide_layers(module: nn.Module, rows: int) -> Iterator[nn.Linear]:
    """The linear layers whose inputs and outputs of all `rows` are that much less."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            numbers = rows * (layer.in_features + layer.out_features)
            if SAVING * numbers <= layer.weight.numel():
                yield layer


def gather_rows(module: nn.Module, rows: Sequence[int]) -> None:
    """Let the wide linear layers of a module gather their rows in backward; state keys stay.

    Their weights' gradients are then equal on all ranks, and no part of an all-reduce.

    Args:
        module: One whose layers see the views of the global batch as rows.
        rows: Of each rank.
    """
    wide: list[Any] = list(wide_layers(module, sum(rows)))
    for layer in wide:
        layer.__class__ = _GatheredLinear
        layer.rows = tuple(rows)


def gathered_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a module whose rows are gathered, by their names."""
    return {
        f"{name}.weight": layer.weight
        for name, layer in module.named_modules()
        if isinstance(layer, _GatheredLinear)
    }


def align(module: nn.Module) -> None:
    """Make the weights whose rows are gathered those of rank 0.

    They are, where all ranks compute alike; another kind of CPU or GPU may round otherwise.
    """
    for weight in gathered_weights(module).values():
        dist.broadcast(weight.data, 0)


class _GatheredLinear(nn.Linear):
    """A linear layer whose weights' gradient is that of the global batch.

    Attributes:
        rows: Of each rank.
    """

    rows: tuple[int, ...]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        y: torch.Tensor = _Product.apply(x, self.weight, self.bias, self.rows)
        return y


class _Product(torch.autograd.Function):
    """X W' + b."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, rows: tuple[int, ...]
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rows = rows
        return functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        waited = gather_begun(torch.cat([x, dy], 1), ctx.rows)
        dx = dy @ weight.to(dy.dtype)
        all_x, all_dy = torch.cat(waited()).split([x.shape[1], dy.shape[1]], 1)
        dw = (all_dy.T @ all_x).to(weight.dtype) / len(ctx.rows)
        return dx, dw, dy.sum(0).to(weight.dtype), None
