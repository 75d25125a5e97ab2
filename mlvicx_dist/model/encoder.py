"""What others load: the gated backbone with its normalisation inside, and its export folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mlvicx_dist.config import METHODS, Model
from mlvicx_dist.errors import CheckpointError
from mlvicx_dist.model.context import ContextBottleneck
from mlvicx_dist.model.levels import GatedBackbone
from mlvicx_dist.model.mlvicx import MLVICX, build_model
from mlvicx_dist.storage import Place, is_local, told, write_whole

EXPORT_FILES = ("README.md", "encoder.safetensors", "config.json")
"""An export folder; `config.json` is written last."""

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

    @property
    def features(self) -> int:
        """F, the numbers of an embedding."""
        return self.backbone.channels[-1]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embed images.

        Args:
            images: uint8, or float in [0, 1], [B, 1 or 3, H, W].

        Returns:
            float [B, F].
        """
        return self.levels(images)[-1].mean((2, 3))

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


def save_export(encoder: Encoder, folder: Place, evidence: dict[str, Any]) -> None:
    """Write `encoder.safetensors`, `config.json` and a model card; a local folder appears whole.

    Raises:
        CheckpointError: the folder or store cannot be written.
    """
    if not is_local(folder):
        with tempfile.TemporaryDirectory(prefix="mlvicx-export-") as scratch:
            local = Path(scratch) / "export"
            save_export(encoder, local, evidence)
            try:
                for name in EXPORT_FILES:
                    write_whole(folder / name, (local / name).read_bytes())
            except OSError as error:
                raise CheckpointError(
                    f"{folder}: the export cannot be written ({told(error)}); check "
                    "your access to the store."
                ) from None
        return
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        weights = {k: v.detach().cpu().contiguous() for k, v in encoder.state_dict().items()}
        save_file(weights, partial / "encoder.safetensors")
        description = {
            "model": encoder.settings.model_dump(mode="json", by_alias=True),
            "image_size_px": encoder.image_size_px,
            "features": encoder.features,
        }
        (partial / "config.json").write_text(json.dumps(description, indent=1) + "\n")
        (partial / "README.md").write_text(_card(encoder, evidence), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{folder}: the export cannot be written ({error}); free space or choose another one."
        ) from None


def load_export(folder: Path) -> Encoder:
    """The encoder of an export folder.

    Raises:
        CheckpointError: a file is missing or damaged, or one key is missing or extra.
    """
    try:
        description = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "encoder.safetensors")
        settings = Model.model_validate(description["model"])
        size = int(description["image_size_px"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: it is no whole export ({str(error).splitlines()[0]}); "
            "write it again with 'mlvicx export'."
        ) from None
    settings = settings.model_copy(update={"init": "random"})
    encoder = Encoder.from_model(build_model(settings, 0), size)
    load_strictly(encoder, weights, where=str(folder))
    return encoder


def _card(encoder: Encoder, evidence: dict[str, Any]) -> str:
    """The model card: what the encoder is, how it is used, what was measured."""
    method = METHODS.get(evidence.get("method") or "", "not told by its source")
    return f"""# {encoder.settings.backbone}, pretrained on chest radiographs without labels

Method: {method}.

Input: grey radiographs of about {encoder.image_size_px} px, uint8 or float in [0, 1]; normalisation
is inside. Output: {encoder.features} numbers an image.

    import mlvicx_dist
    encoder = mlvicx_dist.load_encoder("this/folder")
    embedding = encoder(images)          # [B, 1, H, W] -> [B, {encoder.features}]

Not a medical device: for research only.

## What is known of it

```json
{json.dumps(evidence, indent=1)}
```
"""
