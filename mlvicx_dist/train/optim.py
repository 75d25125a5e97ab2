"""Optimizers and the learning rate, both as DESIGN 4.1 writes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from mlvicx_dist.config import Train

MOMENTUM = 0.9
TRUST = 0.001
FINAL_SHARE = 0.001


class Lars(Optimizer):
    """LARS as the published code writes it (DESIGN 4.1), on all parameters at once.

    d = g + wd p; d *= 0.001 ||p|| / ||d|| (factor 1 where a norm is 0); m = 0.9 m + d; p -= lr m.
    Groups with `adapt: False` (1-d parameters) take d = g.
    """

    def __init__(
        self, params: Iterable[Any], *, lr: float, weight_decay: float, momentum: float = MOMENTUM
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "adapt": True}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            updates = [p.grad for p in params]
            if group["adapt"]:
                updates = _adapted(updates, params, group["weight_decay"])
            buffers = []
            for p in params:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                buffers.append(self.state[p]["momentum"])
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates)
            torch._foreach_add_(params, buffers, alpha=-group["lr"])
        return loss


def _adapted(
    gradients: list[Any], params: list[torch.Tensor], weight_decay: float
) -> list[torch.Tensor]:
    """D = (g + wd p) * 0.001 ||p|| / ||g + wd p||."""
    updates = list(torch._foreach_add(gradients, params, alpha=weight_decay))
    weights = torch.stack(torch._foreach_norm(params))
    lengths = torch.stack(torch._foreach_norm(updates))
    factors = torch.where((weights > 0) & (lengths > 0), TRUST * weights / lengths, 1.0)
    torch._foreach_mul_(updates, list(factors.unbind()))
    return updates


def make_optimizer(model: nn.Module, settings: Train) -> Optimizer:
    """The optimizer of the settings; 1-d parameters are neither decayed nor adapted."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1]},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if settings.optimizer == "adamw":
        return AdamW(groups, lr=0.0, weight_decay=settings.weight_decay, foreach=True)
    groups[1]["adapt"] = False
    return Lars(groups, lr=0.0, weight_decay=settings.weight_decay)


def learning_rate(step: int, *, settings: Train, steps_per_epoch: int) -> float:
    """The learning rate of a step: linear warm-up, then a cosine to 0.001 of the peak.

    `cosine_over: all_steps` is the released form: its cosine is as long as the whole run, begun
    after the warm-up, so it ends a little above (0.00111 of the peak at 300 epochs).

    Args:
        step: The step, from 0.
        settings: Peak, warm-up and length.
        steps_per_epoch: Optimizer steps an epoch.
    """
    peak = settings.learning_rate_per_256 * settings.batch_size / 256
    total = settings.total_steps(steps_per_epoch)
    warmup = settings.warmup_epochs * steps_per_epoch
    if step < warmup:
        return peak * step / warmup
    length = total if settings.cosine_over == "all_steps" else max(total - warmup, 1)
    share = (1 + math.cos(math.pi * (step - warmup) / length)) / 2
    return peak * (share + FINAL_SHARE * (1 - share))
