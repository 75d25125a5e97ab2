"""The two views (DESIGN 3.5): geometry on the CPU, the rest batched on the device.

Every parameter is keyed by (seed, epoch, sample, view), so an image gets the same two views
whoever loads it. Hue, saturation and random grey do nothing to a grey image and are left out.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image

from mlvicx_dist.config import Views
from mlvicx_dist.stream import keyed

CROP_TRIES = 10
DRAWS = 4 * CROP_TRIES + 8
BLOCK_PX = 32
"""Rows of a blur that are computed at once."""
PARAMETERS = ("factor1", "contrast1", "factor2", "contrast2", "blur_sigma_px", "solarise")
"""Columns of the photometric table: two jitter steps (a factor, and whether it is contrast or
brightness), the blur (0 is none) and whether to solarise."""


def two_views(
    image: np.ndarray, views: Views, *, seed: int, epoch: int, sample: int
) -> tuple[np.ndarray, np.ndarray]:
    """Crop, resize and flip an image twice, and draw what the device is to do; see `few_views`."""
    return few_views(image, views, 2, seed=seed, epoch=epoch, sample=sample)


def few_views(
    image: np.ndarray, views: Views, count: int, *, seed: int, epoch: int, sample: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first one or two views of an image, and what the device is to do with each.

    Args:
        image: Grey image, uint8 [H, W].
        views: The settings.
        count: V, 1 or 2.
        seed: The run's seed.
        epoch: The epoch.
        sample: The global sample index.

    Returns:
        Crops, uint8 [V, 1, S, S], and their photometric table, float32 [V, 6].
    """
    size = views.image_size_px
    crops = np.empty((count, 1, size, size), np.uint8)
    table = np.empty((count, len(PARAMETERS)), np.float32)
    picture = Image.fromarray(image)
    for view in range(count):
        draws = keyed.uniform(
            DRAWS, seed=seed, epoch=epoch, purpose=keyed.VIEWS, item=sample, part=view
        )
        box = crop_box(picture.height, picture.width, views, draws[: 4 * CROP_TRIES])
        crop = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=box))
        rest = draws[4 * CROP_TRIES :]
        crops[view, 0] = crop[:, ::-1] if rest[0] < views.flip_p else crop
        table[view] = photometric_row(views, view, rest[1:])
    return crops, table


def crop_box(height: int, width: int, views: Views, draws: np.ndarray) -> tuple[int, int, int, int]:
    """Random resized crop: the first of ten tries that fits, else the largest centred one.

    Args:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        views: `crop_scale` is the crop's share of the area, `crop_ratio` its width over height.
        draws: Uniform numbers, [40].

    Returns:
        (left, top, right, bottom) in pixels.
    """
    low, high = views.crop_scale
    log_low, log_high = (math.log(ratio) for ratio in views.crop_ratio)
    for area, aspect, top, left in draws.reshape(CROP_TRIES, 4).tolist():
        target = height * width * (low + (high - low) * area)
        ratio = math.exp(log_low + (log_high - log_low) * aspect)
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(left * (width - w + 1)), int(top * (height - h + 1))
            return x, y, x + w, y + h
    ratio = min(max(width / height, views.crop_ratio[0]), views.crop_ratio[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def photometric_row(views: Views, view: int, draws: np.ndarray) -> tuple[float, ...]:
    """One row of the photometric table from 7 uniform numbers."""
    jitter, bright, contrast, swap, blur, sigma, solarise = draws.tolist()
    on = jitter < views.jitter_p
    brightness = 1 + on * views.brightness * (2 * bright - 1)
    contrasting = 1 + on * views.contrast * (2 * contrast - 1)
    steps = ((brightness, 0.0), (contrasting, 1.0))
    first, second = steps if swap < 0.5 else steps[::-1]
    low, high = views.blur_sigma_px
    width = low + (high - low) * sigma if blur < views.blur_p[view] else 0.0
    return (*first, *second, width, float(solarise < views.solarise_p[view]))


def photometrics(images: torch.Tensor, table: torch.Tensor, *, kernel_px: int) -> torch.Tensor:
    """Brightness, contrast, blur and solarise, each with its image's own parameters.

    Args:
        images: Grey views, uint8, or float in [0, 1], [B, 1, S, S].
        table: Photometric table, float32 [B, 6], on the host: which images are blurred or
            solarised is then known without waiting for the device.
        kernel_px: Width of the blur kernel, odd.

    Returns:
        Views in [0, 1], float [B, 1, S, S].
    """
    # A copy that is changed in place: new memory costs more than arithmetic.
    kind = torch.get_default_dtype()
    images = images.to(kind).div_(255) if images.dtype == torch.uint8 else images.clone()
    jitter = table[:, :4, None, None, None].to(images, non_blocking=True)
    factor1, contrast1, factor2, contrast2 = jitter.unbind(1)
    for factor, contrast in ((factor1, contrast1), (factor2, contrast2)):
        # Contrast blends with the image's mean, brightness with black.
        other = (1 - factor) * contrast * images.mean((2, 3), keepdim=True)
        images.mul_(factor).add_(other).clamp_(0, 1)
    images = blur(images, table[:, 4], kernel_px=kernel_px)
    chosen = table[:, 5].nonzero().flatten().to(images.device)
    bright = images[chosen]
    return images.index_copy_(0, chosen, torch.where(bright >= 128 / 255, 1 - bright, bright))


def blur(images: torch.Tensor, sigma_px: torch.Tensor, *, kernel_px: int) -> torch.Tensor:
    """Gaussian blur with a width for each image (0: none) and mirrored borders, in place.

    As a matrix product a side: the kernels, borders included, are banded S x S matrices, of which
    blocks of rows are multiplied with what they reach.

    Args:
        images: [B, 1, S, S].
        sigma_px: Standard deviations in pixels, [B], on the host.
        kernel_px: Width of the kernel, odd.

    Returns:
        `images`.
    """
    chosen = sigma_px.nonzero().flatten()
    if not len(chosen):
        return images
    some = len(chosen) < len(images)
    sigmas, chosen = sigma_px[chosen].to(images), chosen.to(images.device)
    picked = images[chosen, 0] if some else images[:, 0]
    blocks = _blur_blocks(sigmas, images.shape[-1], kernel_px)
    rows = torch.cat([block @ picked[:, reach] for _, reach, block in blocks], 1)
    for place, reach, block in blocks:
        picked[:, :, place] = rows[:, :, reach] @ block.transpose(1, 2)
    return images.index_copy_(0, chosen, picked.unsqueeze(1)) if some else images


def _blur_blocks(
    sigma_px: torch.Tensor, size: int, kernel_px: int
) -> list[tuple[slice, slice, torch.Tensor]]:
    """The blur along one side: blocks of rows, what they reach, and their [B, rows, reach]."""
    half = kernel_px // 2
    offsets = torch.arange(-half, half + 1, device=sigma_px.device, dtype=sigma_px.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma_px[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    rows = torch.arange(size, device=sigma_px.device)
    # Mirror without repeating the border pixel, over a period of 2 (size - 1).
    source = (rows[:, None] + offsets.long()) % (2 * (size - 1))
    source = torch.where(source >= size, 2 * (size - 1) - source, source)
    starts = (rows - rows % BLOCK_PX - half).clamp(min=0)
    index = (source - starts[:, None]).expand(len(sigma_px), -1, -1)
    matrix = kernel.new_zeros(len(sigma_px), size, BLOCK_PX + 2 * half)
    matrix.scatter_add_(2, index, kernel[:, None].expand(-1, size, -1).contiguous())
    return [
        (place, reach, matrix[:, place, : reach.stop - reach.start])
        for place, reach in blur_reaches(size, kernel_px)
    ]


def blur_reaches(size: int, kernel_px: int) -> list[tuple[slice, slice]]:
    """Blocks of the rows of a blur, and the rows that each is computed from."""
    half = kernel_px // 2
    return [
        (
            slice(first, min(first + BLOCK_PX, size)),
            slice(max(first - half, 0), min(first + BLOCK_PX + half, size)),
        )
        for first in range(0, size, BLOCK_PX)
    ]
