"""Gradients of wide linear layers from the rows of the global batch, not by an all-reduce.

dW = sum over ranks of dY_r' X_r / W, [out, in] (the mean, as DDP takes it). Of the default's
projectors that is nine tenths of what workers exchange at a step, yet a product of two matrices
whose rows are the batch's views: where these are fewer numbers, they are gathered, and each rank
computes the whole product, when backward is through, so that they travel beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import Variable
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mlvicx_dist.objective.global_batch import gather_begun

SAVING = 4
"""How many times fewer than the weights the rows' numbers must be: the product is done W times."""


def wide_layers(module: nn.Module, rows: int) -> Iterator[nn.Linear]:
    """The trained linear layers whose inputs and outputs of all `rows` are that much less."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and layer.weight.requires_grad and layer.bias is not None:
            numbers = rows * (layer.in_features + layer.out_features)
            if SAVING * numbers <= layer.weight.numel():
                yield layer


def gather_rows(layers: Iterable[nn.Linear], rows: Sequence[int]) -> None:
    """Let linear layers gather their rows in backward; state keys stay.

    Their weights' gradients are then those of the global batch on every rank, and no part of an
    all-reduce.

    Args:
        layers: Layers whose rows are those of the global batch.
        rows: Of each rank.
    """
    wide: Iterable[Any] = layers
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
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        y: torch.Tensor = _Product.apply(x, self.weight, self.bias, self.rows)
        return y


class _Product(torch.autograd.Function):
    """X W' + b; the gradient of W is put in its place at the end of backward."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, rows: tuple[int, ...]
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.rows = weight, rows
        return functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,), weight, rows = ctx.saved_tensors, ctx.weight, ctx.rows
        widths = [x.shape[1], dy.shape[1]]
        waited = gather_begun(torch.cat([x, dy], 1), rows)

        @torch.no_grad()
        def finish() -> None:
            all_x, all_dy = torch.cat(waited()).split(widths, 1)
            dw = (all_dy.T @ all_x).to(weight.dtype).div_(len(rows))
            weight.grad = dw if weight.grad is None else weight.grad + dw

        # As DDP ends its own backward.
        Variable._execution_engine.queue_callback(finish)
        return dy @ weight.to(dy.dtype), None, dy.sum(0).to(weight.dtype), None
