"""What the context bottlenecks attend to: their spatial gates over some images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from mlvicx_dist.evaluate.embed import WholeImages
from mlvicx_dist.model.context import ContextBottleneck
from mlvicx_dist.model.encoder import Encoder
from mlvicx_dist.report.contact import BACKGROUND, CAPTION_PX, CELL_PX, GAP_PX, TEXT
from mlvicx_dist.stream.shardset import ShardSet

WARM = (213, 94, 0)
"""The colour of a place that passes more than the others of its map."""


def context_maps(
    encoder: Encoder, folders: Sequence[str | Path], split: str, *, count: int
) -> Image.Image | None:
    """Images, and over each the spatial gate of every level, tinted from its least to its most.

    Args:
        encoder: In eval mode.
        folders: Shard folders.
        split: Whose images.
        count: How many, spread over the split.

    Returns:
        An RGB picture, an image a row; None where the encoder has no context.

    Raises:
        UserError: the shards cannot be read.
    """
    if not encoder.backbone.gates:
        return None
    whole = WholeImages(ShardSet.open(folders, splits=[split]), encoder.image_size_px)
    images = []
    for sample in np.linspace(0, len(whole) - 1, min(count, len(whole))).round().astype(int):
        item = whole[int(sample)]
        if isinstance(item, Exception):
            raise item
        images.append(item[0])
    gates = gates_of(encoder, torch.from_numpy(np.stack(images))[:, None])
    width, height = CELL_PX + GAP_PX, CELL_PX + GAP_PX
    size = (GAP_PX + width * (1 + len(gates)), CAPTION_PX + GAP_PX + height * len(images))
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(["image", *(f"level {level}" for level in gates)]):
        draw.text((GAP_PX + column * width, 3), name, fill=TEXT)
    for row, image in enumerate(images):
        plain = Image.fromarray(image).resize((CELL_PX, CELL_PX), Image.Resampling.BICUBIC)
        top = CAPTION_PX + row * height
        sheet.paste(plain, (GAP_PX, top))
        for column, gate in enumerate(gates.values(), 1):
            sheet.paste(tinted(plain, gate[row].numpy()), (GAP_PX + column * width, top))
    return sheet


@torch.inference_mode()
def gates_of(encoder: Encoder, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The spatial gates of each level, [B, H_l, W_l], of images uint8 [B, 1, H, W]."""
    found: dict[str, torch.Tensor] = {}

    def keep(level: str, gate: ContextBottleneck, x: torch.Tensor) -> None:
        found[level] = gate.places(x)[:, 0].float()

    handles = []
    for level, gate in encoder.backbone.gates.items():
        assert isinstance(gate, ContextBottleneck)
        handles.append(
            gate.register_forward_pre_hook(
                lambda module, inputs, level=level: keep(level, module, inputs[0])
            )
        )
    try:
        encoder(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


def tinted(plain: Image.Image, gate: np.ndarray) -> Image.Image:
    """A grey picture, tinted the more the more a gate [H, W] passes there."""
    spread = float(np.ptp(gate))
    share = (gate - gate.min()) / spread if spread else np.zeros_like(gate)
    mask = Image.fromarray((share * 170).astype(np.uint8)).resize(
        plain.size, Image.Resampling.BILINEAR
    )
    picture = plain.convert("RGB")
    picture.paste(Image.new("RGB", plain.size, WARM), mask=mask)
    return picture
