"""What the context bottlenecks attend to: their spatial gates over some images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from mlvicx_dist.evaluate.embed import WholeImages
from mlvicx_dist.model.encoder import Encoder
from mlvicx_dist.report.contact import BACKGROUND, CAPTION_PX, CELL_PX, GAP_PX, TEXT
from mlvicx_dist.stream.cache import Cache
from mlvicx_dist.stream.shardset import ShardSet

WARM = (213, 94, 0)
"""The colour of a place that passes more than the others of its map."""


def context_maps(
    encoder: Encoder,
    folders: Sequence[str | Path],
    split: str,
    *,
    count: int,
    cache: Cache | None = None,
) -> Image.Image | None:
    """Images, and over each the spatial gate of every level, tinted from its least to its most.

    Args:
        encoder: In eval mode.
        folders: Shard folders.
        split: Whose images.
        count: How many, spread over the split.
        cache: Where the shards of URLs are kept; None: the default place.

    Returns:
        An RGB picture, an image a row; None where the encoder has no context.

    Raises:
        UserError: the shards cannot be read.
    """
    if not encoder.backbone.gates:
        return None
    whole = WholeImages(ShardSet.open(folders, splits=[split], cache=cache), encoder.image_size_px)
    images = []
    for sample in np.linspace(0, len(whole) - 1, min(count, len(whole))).round().astype(int):
        item = whole[int(sample)]
        if isinstance(item, Exception):
            raise item
        images.append(item)
    gates = encoder.context_maps(torch.from_numpy(np.stack(images))[:, None])
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
            sheet.paste(tinted(plain, gate[row, 0].float().numpy()), (GAP_PX + column * width, top))
    return sheet


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
