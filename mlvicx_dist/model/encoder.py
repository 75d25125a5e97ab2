"""What others load: the gated backbone with its normalisation inside."""

from __future__ import annotations

import hashlib
from functools import partial

import numpy as np
import torch
from torch import nn

from mlvicx_dist.config import Model
from mlvicx_dist.errors import CheckpointError
from mlvicx_dist.model.context import ContextBottleneck
from mlvicx_dist.model.levels import GatedBackbone
from mlvicx_dist.model.mlvicx import MLVICX, build_model
from mlvicx_dist.stream.loader import as_bytes
from mlvicx_dist.stream.whole import squared

NORMALISATION = {
    1: ((0.5,), (0.25,)),
    3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Mean and standard deviation by channels: round figures for grey, ImageNet's for RGB."""


def normalise(images: torch.Tensor, channels: int) -> torch.Tensor:
    """Images as the backbone takes them.

    Args:
        images: In [0, 1], float [B, 1 or 3, H, W]; 3 channels are averaged for a grey backbone, 1
            is repeated for an RGB one.
        channels: Channels of the backbone, 1 or 3.

    Returns:
        float [B, channels, H, W].
    """
    if images.shape[1] == 3 and channels == 1:
        images = images.mean(1, keepdim=True)
    mean, std = (images.new_tensor(v)[:, None, None] for v in NORMALISATION[channels])
    return (images - mean).div_(std)


class Encoder(nn.Module):
    """Images to embeddings; normalisation is inside.

    Attributes:
        settings: The model's settings.
        image_size_px: The size of the views that it was pretrained on.
    """

    def __init__(self, backbone: GatedBackbone, settings: Model, image_size_px: int) -> None:
        super().__init__()
        self.backbone, self.settings, self.image_size_px = backbone, settings, image_size_px

    @classmethod
    def from_model(cls, model: MLVICX, image_size_px: int) -> Encoder:
        """The encoder inside a model under training; the weights are shared."""
        return cls(model.encoder, model.settings, image_size_px)

    @classmethod
    def bare(cls, settings: Model, image_size_px: int) -> Encoder:
        """An encoder whose weights are still to be loaded; no number of PyTorch's is used up."""
        with torch.random.fork_rng(devices=[]):
            backbone = GatedBackbone(settings.model_copy(update={"init": "random"}))
        return cls(backbone, settings, image_size_px)

    @property
    def features(self) -> int:
        """F, the numbers of an embedding."""
        return self.backbone.channels[-1]

    @property
    def gated(self) -> list[str]:
        """The levels that have a context bottleneck, by their numbers."""
        return list(self.backbone.gates)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embed images.

        Args:
            images: uint8, or float in [0, 1], [B, 1 or 3, H, W].

        Returns:
            float [B, F].
        """
        return self.levels(images)[-1].mean((2, 3))

    def prepare(self, grey: np.ndarray) -> torch.Tensor:
        """A radiograph as evaluation shows it: whole, aspect kept, padded to a square.

        Args:
            grey: uint8 or uint16 [H, W], air dark, such as `ingest.dicom.read_grey` gives.

        Returns:
            uint8 [1, 1, S, S], S = `image_size_px`.
        """
        return torch.from_numpy(squared(as_bytes(grey), self.image_size_px))[None, None]

    def levels(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The gated maps of every level, [B, C_l, H_l, W_l] each."""
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must be [B, 1 or 3, H, W], not {list(images.shape)}")
        if images.dtype == torch.uint8:
            images = images / 255
        maps: list[torch.Tensor] = self.backbone(normalise(images, self.settings.channels))
        return maps

    @torch.no_grad()
    def context_maps(self, images: torch.Tensor) -> dict[int, torch.Tensor]:
        """The places' gate of each level with a context, [B, 1, H_l, W_l] in (0, 1)."""
        maps: dict[int, torch.Tensor] = {}

        def look(level: int, gate: ContextBottleneck, inputs: tuple[torch.Tensor]) -> None:
            maps[level] = gate.places(inputs[0])

        gates = {int(level): gate for level, gate in self.backbone.gates.items()}
        hooks = [
            gate.register_forward_pre_hook(partial(look, level)) for level, gate in gates.items()
        ]
        try:
            self.levels(images)
        finally:
            for hook in hooks:
                hook.remove()
        return maps


def untrained(encoder: Encoder, seed: int) -> Encoder:
    """The same architecture with the weights that a run of this seed starts from, in eval mode."""
    settings = encoder.settings.model_copy(update={"init": "random"})
    return Encoder.from_model(build_model(settings, seed), encoder.image_size_px).eval()


def encoder_digest(encoder: nn.Module) -> str:
    """SHA-256 of the names, kinds, shapes and values of all weights and statistics, hexadecimal.

    The same for a checkpoint and its export.
    """
    found = hashlib.sha256(type(encoder).__name__.encode())
    for name, value in sorted(encoder.state_dict().items()):
        value = value.detach().cpu().contiguous()
        found.update(f"\n{name} {value.dtype} {list(value.shape)}\n".encode())
        found.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def load_strictly(module: nn.Module, weights: dict[str, torch.Tensor], *, where: str) -> None:
    """Load weights of which not one may be missing, extra or of another shape.

    Raises:
        CheckpointError: they do not fit; names the first keys that differ.
    """
    own = module.state_dict()
    wrong = [
        *(f"{key} is missing" for key in own.keys() - weights.keys()),
        *(f"{key} is extra" for key in weights.keys() - own.keys()),
        *(
            f"{key} is {list(weights[key].shape)} and should be {list(own[key].shape)}"
            for key in own.keys() & weights.keys()
            if own[key].shape != weights[key].shape
        ),
    ]
    if wrong:
        raise CheckpointError(
            f"{where}: the weights do not fit the model ({'; '.join(sorted(wrong)[:3])}; "
            f"{len(wrong)} in all); give the settings that they were trained with."
        )
    module.load_state_dict(weights)
