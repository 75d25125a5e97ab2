"""The context bottleneck: a channel gate, then a spatial gate (DESIGN 4.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.grad import conv2d_weight


class ContextBottleneck(nn.Module):
    """Weighs a map's channels by its global pools, then its places by its channel pools.

    Channel: x * sigmoid(f(avgpool x) + f(maxpool x)), f a bottleneck of half the channels, one for
    both pools. Spatial: y * sigmoid(conv7x7 [mean_c y, max_c y]). No residual, no norm, no bias.
    Of places that share a maximum one gets its gradient; channels that share one share it.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.excite = nn.Conv2d(channels // 2, channels, 1, bias=False)
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Gate a map, [B, C, H, W] -> [B, C, H, W]."""
        gated: torch.Tensor = _Gates.apply(
            x, self.squeeze.weight, self.excite.weight, self.spatial.weight
        )
        return gated

    @torch.no_grad()
    def places(self, x: torch.Tensor) -> torch.Tensor:
        """The places' gate of a map, [B, C, H, W] -> [B, 1, H, W] in (0, 1)."""
        return _gates(x, self.squeeze.weight, self.excite.weight, self.spatial.weight)[-1]


class _Gates(torch.autograd.Function):
    """Both gates, in few passes over the map, which are what they cost.

    Only the map itself is kept for backward. What is small is computed in float32 at least. In the
    names `c` is the channels' gate, [B, C], and `p` the places', [B, 1, H, W]; backward has maps as
    [B, C, H * W].
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        squeeze: torch.Tensor,
        excite: torch.Tensor,
        spatial: torch.Tensor,
    ) -> torch.Tensor:
        y, pools, hidden, c, places, top, strongest, p = _gates(x, squeeze, excite, spatial)
        y *= p.to(x.dtype)
        ctx.save_for_backward(
            x, squeeze, excite, spatial, pools, hidden, c, places, p, top, strongest
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, squeeze, excite, spatial, pools, hidden, c, places, p, top, strongest = ctx.saved_tensors
        kind, fine = x.dtype, c.dtype
        channels = c[..., None].to(kind)
        down, up, window = squeeze.flatten(1).to(fine), excite.flatten(1).to(fine), spatial.to(fine)
        with torch.autocast(x.device.type, enabled=False):
            m, g = x.flatten(2), gradient.flatten(2)
            # The places' gate.
            passes = m * g
            d_p = (channels.mT @ passes).to(fine).view_as(p) * p * (1 - p)
            d_window = conv2d_weight(places, window.shape, d_p, padding=3)
            turned = window.flip(2, 3).transpose(0, 1)
            d_places = functional.conv2d(d_p, turned, padding=3).flatten(2)
            # The channel-gated map y: through the gate, as part of the means, as a maximum.
            y = torch.mul(m, channels, out=passes)
            is_strongest = torch.eq(y, strongest.flatten(1)[:, None], out=torch.empty_like(y))
            ties = torch.ones_like(channels).mT @ is_strongest
            mean, maximum = (d_places / places.new_tensor([[x.shape[1]], [1]])).to(kind).split(1, 1)
            d_y = torch.mul(g, p.flatten(2).to(kind), out=y)
            d_y.addcmul_(is_strongest, maximum / ties).add_(mean)
            # The channels' gate, and what it owes to the pools.
            d_c = torch.mul(m, d_y, out=is_strongest).sum(2).to(fine) * c * (1 - c)
            d_hidden = (d_c @ up) * (hidden > 0)
            d_up = d_c.T @ hidden.sum(0)
            d_down = torch.einsum("kbh,kbc->hc", d_hidden, pools)
            average, highest = (d_hidden @ down).to(kind)
            d_x = d_y.mul_(channels).add_(average[..., None] / m.shape[2])
            # Not by scatter_add_, which copies a map that is channels_last.
            image, channel = (torch.arange(n, device=m.device) for n in m.shape[:2])
            d_x[image[:, None], channel, top.flatten(1)] += highest
        return (
            d_x.view_as(x),
            d_down.view_as(squeeze).to(squeeze.dtype),
            d_up.view_as(excite).to(excite.dtype),
            d_window.to(spatial.dtype),
        )


def _gates(
    x: torch.Tensor, squeeze: torch.Tensor, excite: torch.Tensor, spatial: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The channel-gated map, what both gates are computed from, and the places' gate, last."""
    fine = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        highest, top = functional.adaptive_max_pool2d(x, 1, return_indices=True)
        pools = torch.stack([x.mean((2, 3)), highest.flatten(1)]).to(fine)
        hidden = (pools @ squeeze.flatten(1).to(fine).T).relu()
        c = (hidden.sum(0) @ excite.flatten(1).to(fine).T).sigmoid()
        y = x * c[..., None, None].to(x.dtype)
        strongest = y.amax(1)
        places = torch.stack([y.mean(1), strongest], 1).to(fine)
        p = functional.conv2d(places, spatial.to(fine), padding=3).sigmoid()
    return y, pools, hidden, c, places, top, strongest, p
