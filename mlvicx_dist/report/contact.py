"""A contact sheet: stored images and the two views that training would see of each."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from mlvicx_dist.config import Views
from mlvicx_dist.stream import keyed
from mlvicx_dist.stream.augment import photometrics, two_views
from mlvicx_dist.stream.cache import Cache
from mlvicx_dist.stream.loader import as_bytes
from mlvicx_dist.stream.shardset import ShardSet
from mlvicx_dist.stream.whole import squared

CELL_PX, GAP_PX, CAPTION_PX = 160, 6, 18
BACKGROUND, TEXT = (17, 20, 24), (198, 205, 213)
MASK, BOX = (213, 94, 0), (240, 228, 66)


def contact_sheet(
    folders: Sequence[str | Path], views: Views, *, count: int, seed: int = 0
) -> tuple[Image.Image, int]:
    """Images drawn at random, each beside its two views, with its labels, mask and boxes.

    Args:
        folders: Shard folders.
        views: How the views are made.
        count: Images shown, if there are so many.
        seed: Of the choice and of the views.

    Returns:
        An RGB picture, two images a row; and how many images it shows.
    """
    shown = list(contacts(folders, views, count=count, seed=seed))
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    width, height = 3 * CELL_PX + 3 * GAP_PX, CELL_PX + CAPTION_PX + GAP_PX
    sheet = Image.new("RGB", (columns * (width + GAP_PX), rows * height + GAP_PX), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for place, (strip, caption) in enumerate(shown):
        left = GAP_PX + place % columns * (width + GAP_PX)
        top = GAP_PX + place // columns * height
        sheet.paste(strip, (left, top))
        draw.text((left, top + CELL_PX + 2), caption, fill=TEXT)
    return sheet, len(shown)


def contacts(
    folders: Sequence[str | Path],
    views: Views,
    *,
    count: int,
    seed: int = 0,
    splits: Sequence[str] | None = None,
    cache: Cache | None = None,
) -> Iterator[tuple[Image.Image, str]]:
    """The same one by one: an image beside its two views, RGB, and what is known of it."""
    shards = ShardSet.open(folders, splits=splits, cache=cache)
    chosen = keyed.permutation(len(shards), seed=seed, epoch=0, purpose=keyed.SHARDS)[:count]
    for sample in chosen.tolist():
        image, known = as_bytes(shards.image(sample)), shards.about(sample)
        strip = Image.new("RGB", (3 * CELL_PX + 2 * GAP_PX, CELL_PX), BACKGROUND)
        cells = [squared(image, CELL_PX), *_views(image, views, seed, sample)]
        for number, cell in enumerate(cells):
            picture = Image.fromarray(cell).resize((CELL_PX, CELL_PX), Image.Resampling.BICUBIC)
            if number == 0:
                picture = _marked(picture, image, shards.mask(sample), known["boxes"])
            strip.paste(picture, (number * (CELL_PX + GAP_PX), 0))
        yield strip, _caption(known)


def for_page(picture: Image.Image, *, caption: str, alt: str) -> dict[str, str]:
    """A picture as a page holds it in itself; `alt` is for those who do not see it."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    uri = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"uri": uri, "caption": caption, "alt": alt}


def _marked(
    picture: Image.Image, image: np.ndarray, mask: np.ndarray | None, boxes: list[dict[str, Any]]
) -> Image.Image:
    """The squared image with its mask tinted and its boxes drawn, RGB."""
    picture = picture.convert("RGB")
    if mask is not None:
        inside = Image.fromarray(squared(mask, CELL_PX) // 2)
        picture.paste(Image.new("RGB", picture.size, MASK), mask=inside)
    height, width = image.shape
    scale = CELL_PX / max(height, width)
    left, top = (CELL_PX - width * scale) / 2, (CELL_PX - height * scale) / 2
    draw = ImageDraw.Draw(picture)
    for box in boxes:
        sides = [box[side] * scale for side in ("left", "top", "right", "bottom")]
        corners = [sides[0] + left, sides[1] + top, sides[2] + left, sides[3] + top]
        draw.rectangle(corners, outline=BOX)
    return picture


def _views(image: np.ndarray, views: Views, seed: int, sample: int) -> list[np.ndarray]:
    crops, table = two_views(image, views, seed=seed, epoch=0, sample=sample)
    seen = photometrics(
        torch.from_numpy(crops), torch.from_numpy(table), kernel_px=views.blur_kernel_px
    )
    return list((seen[:, 0] * 255).round().byte().numpy())


def _caption(known: dict[str, Any]) -> str:
    present = [name for name, value in known["labels"].items() if value]
    unknown = known["labels"] and all(value is None for value in known["labels"].values())
    words = ", ".join(present) or ("unlabelled" if unknown else "no finding")
    return f"{words} | {known['split']} | image, view 1, view 2"
