"""Masks as run lengths, the form of SIIM-ACR, and as the PNG that a shard holds."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage


@dataclass(frozen=True)
class RunLengths:
    """The union of several masks of one image.

    Attributes:
        runs: Each a text of (offset, length) pairs: the offset counts from the end of the run
            before, zero-based, down the columns. None of them: an empty mask.
        height: Of the image that they belong to, in pixels.
        width: Likewise.
    """

    runs: tuple[str, ...]
    height: int = 1024
    width: int = 1024


def decode_runs(masks: RunLengths) -> np.ndarray:
    """The mask, bool [height, width].

    Raises:
        ValueError: the numbers are not pairs, or reach beyond the image.
    """
    covered = np.zeros(masks.width * masks.height, bool)
    for text in masks.runs:
        for start, stop in _bounds(text, len(covered)):
            covered[start:stop] = True
    return covered.reshape(masks.width, masks.height).T


def check_runs(text: str, pixels: int) -> None:
    """Raise a ValueError where a text is no mask of an image of so many pixels."""
    _bounds(text, pixels)


def stored_mask(mask: np.ndarray, size: Sequence[int]) -> bytes:
    """A mask as a lossless PNG of 0 and 255.

    Args:
        mask: bool [H, W].
        size: (width, height) of the stored image; a pixel is set where half of it or more is. Of a
            piece that would set none, every pixel in which one of its own has its centre.
    """
    picture = Image.fromarray(mask.astype(np.uint8) * 255)
    if picture.size != tuple(size):
        picture = picture.resize((size[0], size[1]), Image.Resampling.BOX)
        picture = picture.point(lambda value: 255 * (value >= 128))
        picture = Image.fromarray(np.asarray(picture) | 255 * _lost(mask, np.asarray(picture) > 0))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _lost(mask: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """Where the pieces of a mask are of which a smaller one has no pixel, uint8 0 or 1.

    Args:
        mask: bool [H, W]; pixels that touch, be it at a corner, are of one piece.
        stored: The smaller one, bool [h, w].
    """
    pieces, count = ndimage.label(mask, np.ones((3, 3)))
    rows, columns = np.nonzero(mask)
    piece = pieces[rows, columns]
    # The pixel of the smaller one that holds the centre of each.
    rows, columns = (
        (2 * one + 1) * small // (2 * large)
        for one, small, large in zip((rows, columns), stored.shape, mask.shape, strict=True)
    )
    kept = np.zeros(count + 1, bool)
    kept[piece[stored[rows, columns]]] = True
    found = np.zeros(stored.shape, np.uint8)
    gone = ~kept[piece]
    found[rows[gone], columns[gone]] = 1
    return found


def _bounds(text: str, pixels: int) -> np.ndarray:
    """Start and end of each run, int64 [runs, 2]."""
    words = [int(word) for word in text.split()]
    if len(words) % 2 or min(words, default=0) < 0:
        raise ValueError("it is not a list of pairs (offset, length)")
    if sum(words) > pixels:
        raise ValueError(f"its runs reach beyond the {pixels} pixels of the image")
    offsets, lengths = np.array(words, dtype=np.int64).reshape(-1, 2).T
    ends = np.cumsum(offsets + lengths)
    return np.stack([ends - lengths, ends], 1)
