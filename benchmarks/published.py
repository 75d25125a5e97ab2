"""The published model and loss, written out plainly from DESIGN 4.1: what ours is held against.

Each level map is resized to 64 x 64, convolved there and pooled; the gates and the covariance are
as the formulas have them. Its weights have the names of ours, so that one takes the other's.
"""

from __future__ import annotations

from collections.abc import Sequence

import timm
import torch
from torch import nn
from torch.nn import functional

RESIZE_PX, CHANNELS, POOL = 64, 512, 4


class Gate(nn.Module):
    """The context bottleneck."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.excite = nn.Conv2d(channels // 2, channels, 1, bias=False)
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        average = self.excite(self.squeeze(functional.adaptive_avg_pool2d(x, 1)).relu())
        highest = self.excite(self.squeeze(functional.adaptive_max_pool2d(x, 1)).relu())
        y = x * torch.sigmoid(average + highest)
        places = torch.cat([y.mean(1, keepdim=True), y.max(1, keepdim=True).values], 1)
        return y * torch.sigmoid(self.spatial(places))


class Encoder(nn.Module):
    """A ResNet of timm with a gate behind its stem and behind each stage."""

    def __init__(self, backbone: str) -> None:
        super().__init__()
        self.backbone = timm.create_model(backbone, features_only=True, in_chans=3)
        self.channels: list[int] = self.backbone.feature_info.channels()
        self.gates = nn.ModuleDict({str(n): Gate(c) for n, c in enumerate(self.channels)})

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The gated maps of the five levels."""
        net = self.backbone
        x = self.gates["0"](net.act1(net.bn1(net.conv1(x))))
        maps = [x]
        x = net.maxpool(x)
        for number, stage in enumerate((net.layer1, net.layer2, net.layer3, net.layer4), 1):
            x = self.gates[str(number)](stage(x))
            maps.append(x)
        return maps


class LocalHead(nn.Module):
    """Resize, convolve, sum over the levels, pool."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, CHANNELS, 1) for c in channels)

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """[B, C_l, H_l, W_l] each -> [B, 8192]."""
        fused = sum(
            conv(functional.interpolate(x, (RESIZE_PX, RESIZE_PX), mode="bilinear"))
            for conv, x in zip(self.convs, maps, strict=True)
        )
        return functional.adaptive_avg_pool2d(fused, POOL).flatten(1)


def projector(features: int, width: int) -> nn.Sequential:
    """Three linear layers, each with a batch norm, ReLU between them."""
    layers: list[nn.Module] = []
    for number in range(3):
        layers += [nn.Linear(width if number else features, width), nn.BatchNorm1d(width)]
        layers += [nn.ReLU()] if number < 2 else []
    return nn.Sequential(*layers)


class Published(nn.Module):
    """One view to its global and its local embedding."""

    def __init__(self, backbone: str, width: int) -> None:
        super().__init__()
        self.encoder = Encoder(backbone)
        self.global_projector = projector(self.encoder.channels[-1], width)
        self.local_head = LocalHead(self.encoder.channels)
        self.local_projectors = nn.ModuleDict({"local": projector(CHANNELS * POOL**2, width)})

    def forward(self, view: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, 3, H, W] -> [B, D], [B, D]."""
        maps = self.encoder(view)
        representation = functional.adaptive_avg_pool2d(maps[-1], 1).flatten(1)
        local = self.local_projectors["local"](self.local_head(maps))
        return self.global_projector(representation), local


def covariance_penalty(z: torch.Tensor) -> torch.Tensor:
    """Of one view, through the D x D covariance."""
    z = z - z.mean(0)
    covariance = z.T @ z / (len(z) - 1)
    off = covariance - torch.diag(torch.diag(covariance))
    return off.square().sum() / z.shape[1]


def vic(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """25 invariance + 25 variance + covariance."""
    hinges = [functional.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() for z in (a, b)]
    penalty = covariance_penalty(a) + covariance_penalty(b)
    return 25 * functional.mse_loss(a, b) + 25 * (hinges[0] + hinges[1]) / 2 + penalty


def published_loss(model: nn.Module, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The loss of two views, view 1 first."""
    (global1, local1), (global2, local2) = model(first), model(second)
    return vic(global1, global2) + vic(local1, local2)
