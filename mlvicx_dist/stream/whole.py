"""An image as evaluation shows it: whole, aspect kept, padded to a square; no crop, no flip."""

from __future__ import annotations

import numpy as np
from PIL import Image


def squared(image: np.ndarray, size_px: int) -> np.ndarray:
    """An image resized to fit a black square, uint8 [H, W] -> [size_px, size_px]."""
    height, width = image.shape
    scale = size_px / max(height, width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    resized = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    square = np.zeros((size_px, size_px), np.uint8)
    top, left = (size_px - size[1]) // 2, (size_px - size[0]) // 2
    square[top : top + size[1], left : left + size[0]] = resized
    return square
