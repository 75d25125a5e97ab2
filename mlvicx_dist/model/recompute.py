"""Recompute in backward: of a backbone's activations only the level maps stay.

The backbone is a chain of modules, cut after each level, gate included. `torch.utils.checkpoint`
keeps what enters a part and runs the part again in backward. Loss, gradients and buffers are those
without it: the second run moves copies of the batch-norm statistics, which are then dropped. The
collectives of a global batch norm are issued again, in the same order on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from timm.models import FeatureListNet
from timm.models.efficientnet import EfficientNetFeatures
from timm.models.mobilenetv3 import MobileNetV3Features
from torch import nn
from torch.utils.checkpoint import checkpoint

from mlvicx_dist.errors import ConfigError

Parts = tuple[tuple[str, ...], ...]
"""Names of modules in the order that they run, one tuple for each level, ending at its map."""


def chain_parts(backbone: Any, name: str) -> Parts:
    """The parts of a backbone as timm hands out its levels; `name` is its name in an error.

    Raises:
        ConfigError: timm does not run this backbone as one chain of modules.
    """
    if isinstance(backbone, FeatureListNet):
        chain, ends = list(backbone), set(backbone.return_layers)
    elif isinstance(backbone, EfficientNetFeatures | MobileNetV3Features):
        stem = [child for child, _ in backbone.named_children() if child != "blocks"]
        blocks = [f"blocks.{k}" for k in range(len(backbone.blocks))]
        chain = stem + blocks
        # As its forward numbers them: 0 is the stem, k + 1 is block k.
        ends = {[stem[-1], *blocks][stage] for stage in backbone._stage_out_idx}
    else:
        raise ConfigError(
            f"train.recompute: {name} is no chain of stages, so it cannot be recomputed; "
            "set train.recompute=false or choose a convolutional model.backbone such as resnet18."
        )
    parts: list[tuple[str, ...]] = []
    part: list[str] = []
    for link in chain:
        part.append(link)
        if link in ends:
            parts.append(tuple(part))
            part = []
    return tuple(parts)


def run_part(backbone: Any, part: Sequence[str], x: Any) -> Any:
    """What leaves the last module of a part, gated where that is chosen."""
    for link in part:
        x = backbone.get_submodule(link)(x)
    return x


def level_map(backbone: Any, x: Any) -> torch.Tensor:
    """The map [B, C, H, W] in what left a part: some backbones hand on several tensors."""
    if isinstance(x, torch.Tensor):
        return x
    chosen: torch.Tensor = torch.cat(tuple(x), 1) if backbone.concat else x[0]
    return chosen


def recomputed_maps(backbone: Any, parts: Parts, images: torch.Tensor) -> list[torch.Tensor]:
    """Images [B, C, H, W] to the map of every level, all between them to be recomputed."""
    maps, x = [], images
    for part in parts:
        modules = [backbone.get_submodule(link) for link in part]
        x = checkpoint(
            partial(run_part, backbone, part),
            x,
            use_reentrant=False,
            context_fn=partial(_contexts, modules),
        )
        maps.append(level_map(backbone, x))
    return maps


def _contexts(
    modules: Sequence[nn.Module],
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """What the first run and the second run in."""
    return nullcontext(), _BuffersKept(modules)


class _BuffersKept(AbstractContextManager[None]):
    """Inside, the buffers of the modules are copies, so that theirs do not move.

    Switching `track_running_stats` off would not do: batch norm then saves fewer tensors than in
    the first run, which `checkpoint` refuses.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._owners = [owner for module in modules for owner in module.modules()]
        self._kept: list[dict[str, torch.Tensor | None]] = []

    def __enter__(self) -> None:
        self._kept = [dict(owner._buffers) for owner in self._owners]
        for owner, buffers in zip(self._owners, self._kept, strict=True):
            owner._buffers.update({k: b if b is None else b.clone() for k, b in buffers.items()})

    def __exit__(self, *error: object) -> None:
        for owner, buffers in zip(self._owners, self._kept, strict=True):
            owner._buffers.update(buffers)
        self._kept = []
