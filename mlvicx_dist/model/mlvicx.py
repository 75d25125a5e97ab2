"""The model that is pretrained: gated backbone, global projector, local head and projectors.

The baselines are the same without local head, SimSiam with a predictor; what is trained on labels
has a linear layer in the projector's place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mlvicx_dist.config import Model
from mlvicx_dist.model.heads import LocalHead, predictor, projector, through
from mlvicx_dist.model.levels import GatedBackbone


class MLVICX(nn.Module):
    """One view to its global and local embeddings (DESIGN 4.1, 4.3)."""

    def __init__(self, settings: Model) -> None:
        super().__init__()
        self.settings = settings
        self.encoder = GatedBackbone(settings)
        features = self.encoder.channels[-1]
        self.global_projector: nn.Module = (
            nn.Linear(features, len(settings.classes))
            if settings.classes
            else projector(settings.projector, features)
        )
        self.local_names = _local_names(settings, self.encoder.levels)
        chosen = [self.encoder.channels[level] for level in self.encoder.levels]
        self.local_head = LocalHead(
            settings.local, chosen, trained=settings.level_convs == "trained"
        )
        self.local_projectors = nn.ModuleDict(
            {
                name: projector(settings.projector, self.local_head.features)
                for name in self.local_names
            }
        )
        self.predictor = (
            predictor(settings.predictor_width, settings.projector.width)
            if settings.predictor_width
            else None
        )

    def forward(self, view: torch.Tensor) -> dict[str, torch.Tensor]:
        """A normalised view [B, C, H, W] to embeddings [B, D] by the name of their term.

        Returns:
            `global`, or where there are K classes their logits [B, K]; `local` or one `level<n>`
            for each chosen level; `prediction` where there is a predictor.
        """
        (embeddings,) = self.project(self.encoder(view))
        return embeddings

    def representation(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """What is kept after pretraining: the average pool of the last map, [B, F]."""
        return maps[-1].mean((2, 3))

    @property
    def heads(self) -> list[nn.Module]:
        """What takes both views of a batch in one product, as `project` has it."""
        heads = (self.global_projector, self.local_projectors, self.predictor)
        return [head for head in heads if head is not None]

    def project(self, *views: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """The maps of all levels of one view, or of several of as many images: their embeddings."""
        kinds = {
            "global": through(self.global_projector, [self.representation(maps) for maps in views])
        }
        if self.local_names:
            levels = self.encoder.levels
            vectors = [self.local_head([maps[level] for level in levels]) for maps in views]
            for name, together in zip(self.local_names, zip(*vectors, strict=True), strict=True):
                kinds[name] = through(self.local_projectors[name], together)
        if self.predictor:
            kinds["prediction"] = through(self.predictor, kinds["global"])
        return [dict(zip(kinds, view, strict=True)) for view in zip(*kinds.values(), strict=True)]


def build_model(settings: Model, seed: int | None = None) -> MLVICX:
    """The model with its starting weights, which `seed` decides alone.

    Raises:
        ConfigError: the backbone or one of its levels does not exist.
    """
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        return MLVICX(settings)


def _local_names(settings: Model, levels: Sequence[int]) -> list[str]:
    if not levels:
        return []
    if settings.local.fusion == "sum":
        return ["local"]
    return [f"level{level}" for level in levels]
