"""An image as evaluation shows it: whole, aspect kept, padded to a square; no crop, no flip."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image


def squared(image: np.ndarray, size_px: int) -> np.ndarray:
    """An image resized to fit a black square, uint8 [H, W] -> [size_px, size_px]."""
    place = place_in_square(image.shape, size_px)
    size = (place[1].stop - place[1].start, place[0].stop - place[0].start)
    square = np.zeros((size_px, size_px), np.uint8)
    square[place] = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    return square


def place_in_square(shape: Sequence[int], size_px: int) -> tuple[slice, slice]:
    """The rows and the columns of a square that an image of shape (H, W) takes there."""
    height, width = (max(round(side * size_px / max(shape)), 1) for side in shape)
    top, left = (size_px - height) // 2, (size_px - width) // 2
    return slice(top, top + height), slice(left, left + width)
