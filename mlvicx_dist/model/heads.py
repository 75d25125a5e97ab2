"""From maps to the vectors that the loss sees: the pooled local head and the projectors.

Pool first (DESIGN 3.3): resize to S x S, 1x1 convolution, average pool to P x P are linear and the
spatial weights sum to one, so resize and pool fold into one P x H matrix a side, applied first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from mlvicx_dist.config import LocalHead as LocalSettings
from mlvicx_dist.config import Projector as ProjectorSettings


@lru_cache(maxsize=256)
def fold_matrix(size: int, resize_px: int, pool: int) -> torch.Tensor:
    """Bilinear resize to `resize_px` and average pool to `pool`, along one side.

    Args:
        size: Side of the map in pixels.
        resize_px: S of DESIGN 3.3.
        pool: P of DESIGN 3.3.

    Returns:
        float64 [pool, size]; its rows sum to one.
    """
    resized = functional.interpolate(
        torch.eye(size, dtype=torch.float64)[None], resize_px, mode="linear", align_corners=False
    )
    return functional.avg_pool1d(resized, resize_px // pool)[0].T.contiguous()


class LocalHead(nn.Module):
    """Chosen level maps to local vectors: one fused, or one a level.

    The convolutions are ordinary parameters, made here: the released code made them inside its
    first forward, where no optimizer saw them (DESIGN 4.2).
    """

    def __init__(self, settings: LocalSettings, channels: Sequence[int], *, trained: bool) -> None:
        super().__init__()
        self.settings = settings
        self.features = settings.channels * settings.pool**2
        self.convs = nn.ModuleList(nn.Conv2d(c, settings.channels, 1) for c in channels)
        self.convs.requires_grad_(trained)
        # As the maps are: DDP would copy gradients of another layout.
        self.convs.to(memory_format=torch.channels_last)

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Maps of the chosen levels, [B, C_l, H_l, W_l] each, to vectors [B, channels * pool^2].

        Returns:
            The sum over levels alone for `fusion: sum`, else one vector a level; channel-major.
        """
        pooled = [conv(self._pool(x)) for conv, x in zip(self.convs, maps, strict=True)]
        if self.settings.fusion == "sum":
            pooled = [torch.stack(pooled).sum(0)]
        return [x.flatten(1) for x in pooled]

    def _pool(self, x: torch.Tensor) -> torch.Tensor:
        """Resize and pool in one, [B, C, H, W] -> [B, C, P, P]."""
        rows, columns = (
            fold_matrix(side, self.settings.resize_px, self.settings.pool).to(x)
            for side in x.shape[2:]
        )
        # In the order of the memory of a map that is channels_last, as its gradient is then.
        across = rows @ x.permute(0, 2, 3, 1).flatten(2)
        return (columns @ across.unflatten(2, (x.shape[3], -1))).permute(0, 3, 1, 2)


def projector(settings: ProjectorSettings, features: int) -> nn.Sequential:
    """Linear, batch norm, ReLU, …, linear; a last batch norm where the settings ask for it."""
    layers: list[nn.Module] = []
    for layer in range(settings.layers):
        layers.append(nn.Linear(features if layer == 0 else settings.width, settings.width))
        if layer < settings.layers - 1:
            layers += [nn.BatchNorm1d(settings.width), nn.ReLU(inplace=True)]
    if settings.last_norm:
        layers.append(nn.BatchNorm1d(settings.width))
    return nn.Sequential(*layers)


def through(layers: nn.Module, views: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Views, [B, F] each, through a projector or predictor: [B, D] each.

    A linear layer takes all of them in one product, so that its weights are read once and their
    gradient is whole before that of the encoder begins; a batch norm takes each by itself, in turn.
    """
    x = torch.cat(list(views))
    for layer in layers if isinstance(layers, nn.Sequential) else [layers]:
        if isinstance(layer, _BatchNorm):
            x = torch.cat([layer(view) for view in x.chunk(len(views))])
        else:
            x = layer(x)
    return list(x.chunk(len(views)))


def predictor(width: int, features: int) -> nn.Sequential:
    """SimSiam's, from an embedding to one as wide: linear, batch norm, ReLU, linear."""
    return nn.Sequential(
        nn.Linear(features, width),
        nn.BatchNorm1d(width),
        nn.ReLU(inplace=True),
        nn.Linear(width, features),
    )
