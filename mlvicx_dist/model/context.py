"""The context bottleneck: a channel gate, then a spatial gate (DESIGN 4.1)."""

from __future__ import annotations

import torch
from torch import nn


class ContextBottleneck(nn.Module):
    """Weighs a map's channels by its global pools, then its places by its channel pools.

    Channel: x * sigmoid(f(avgpool x) + f(maxpool x)), f a bottleneck of half the channels, one for
    both pools. Spatial: y * sigmoid(conv7x7 [mean_c y, max_c y]). No residual, no norm, no bias.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.excite = nn.Conv2d(channels // 2, channels, 1, bias=False)
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Gate a map, [B, C, H, W] -> [B, C, H, W]."""
        pools = torch.cat([x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)])
        average, maximum = self.excite(self.squeeze(pools).relu()).chunk(2)
        y = x * (average + maximum).sigmoid()
        places = torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], 1)
        return y * self.spatial(places).sigmoid()
