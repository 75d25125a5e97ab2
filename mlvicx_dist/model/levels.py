"""A timm backbone with a context bottleneck at each chosen level.

The gates sit at the modules that timm's own `feature_info` names, as forward hooks: the gated map
is what the next stage sees (DESIGN 4.1, 4.3).
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn

from mlvicx_dist.config import Model
from mlvicx_dist.errors import ConfigError, first_line, nearest
from mlvicx_dist.model.context import ContextBottleneck
from mlvicx_dist.model.recompute import Parts, chain_parts, recomputed_maps


class GatedBackbone(nn.Module):
    """Images to the maps of every level.

    Attributes:
        channels: Channels of each level.
        levels: The chosen levels, ascending.
        parts: What is recomputed in backward, by part; empty: nothing.
    """

    def __init__(self, settings: Model) -> None:
        super().__init__()
        self.backbone = _backbone(settings)
        self.channels: list[int] = list(self.backbone.feature_info.channels())
        self.levels = _chosen(settings, len(self.channels))
        self.parts: Parts = ()
        self._name = settings.backbone
        self.gates = nn.ModuleDict()
        if settings.context:
            modules = dict(self.backbone.named_modules())
            for level in self.levels:
                gate = ContextBottleneck(self.channels[level])
                self.gates[str(level)] = gate
                name = self.backbone.feature_info.module_name(level)
                # timm flattens some backbones and then writes '_' for '.'.
                module = modules.get(name, modules.get(name.replace(".", "_")))
                if module is None:
                    raise ConfigError(
                        f"model.backbone {settings.backbone}: its level {level} cannot be gated; "
                        "set model.context=false or choose a plain convolutional backbone."
                    )
                module.register_forward_hook(_Gate(gate))
        # The layout in which convolutions are fastest, on a CPU and on a GPU.
        self.backbone.to(memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Normalised images [B, C, H, W] to one map a level, gated where it is chosen."""
        images = images.contiguous(memory_format=torch.channels_last)
        if self.parts and torch.is_grad_enabled():
            return recomputed_maps(self.backbone, self.parts, images)
        maps: list[torch.Tensor] = self.backbone(images)
        return maps

    def recompute(self) -> None:
        """From now on keep only the level maps for backward and compute all else again there.

        Raises:
            ConfigError: the backbone is no chain of stages.
        """
        self.parts = chain_parts(self.backbone, self._name)


class _Gate:
    """A forward hook whose answer takes the place of the module's output."""

    def __init__(self, gate: ContextBottleneck) -> None:
        self.gate = gate

    def __call__(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        gated: torch.Tensor = self.gate(output)
        return gated


def _backbone(settings: Model) -> Any:
    names = timm.list_models()
    if settings.backbone.split(".")[0] not in names:
        raise ConfigError(
            f"model.backbone {settings.backbone}: timm has no such model"
            f"{nearest(settings.backbone, names)}; 'timm.list_models()' lists them."
        )
    pretrained = settings.init == "imagenet"
    try:
        backbone = timm.create_model(
            settings.backbone,
            features_only=True,
            in_chans=settings.channels,
            pretrained=pretrained,
        )
    except (AttributeError, RuntimeError, OSError) as error:
        if pretrained:
            raise ConfigError(
                f"model.init imagenet: the weights of {settings.backbone} cannot be had "
                f"({type(error).__name__}: {first_line(error)}); connect to the network or --set "
                "model.init=random."
            ) from None
        raise ConfigError(
            f"model.backbone {settings.backbone}: timm cannot hand out its levels "
            f"({first_line(error)}); choose a convolutional backbone such as resnet18."
        ) from None
    return backbone


def _chosen(settings: Model, count: int) -> tuple[int, ...]:
    if settings.levels == "all":
        return tuple(range(count))
    beyond = [level for level in settings.levels if level >= count]
    if beyond:
        raise ConfigError(
            f"model.levels names level {beyond[0]}, but {settings.backbone} has the levels "
            f"0 to {count - 1}; leave it out."
        )
    return tuple(sorted(settings.levels))
