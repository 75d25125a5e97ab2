"""Whether another form of an encoder gives its numbers, on images that anyone can draw."""

from __future__ import annotations

import numpy as np
import torch

from mlvicx_dist.ingest.sources.anatomy import draw_phantom
from mlvicx_dist.stream.whole import squared

TOLERANCE = 1e-4
"""The largest difference of two outputs, by the largest value of the right one."""


def phantoms(size_px: int, count: int = 2) -> torch.Tensor:
    """Drawn radiographs, always the same, uint8 [count, 1, size_px, size_px]."""
    drawn = [
        squared((draw_phantom(0, index).pixels >> 4).astype(np.uint8), size_px)
        for index in range(count)
    ]
    return torch.from_numpy(np.stack(drawn))[:, None]


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest value that is expected; NaN if any is."""
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return float((found - expected).abs().max() / scale)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether they agree to `TOLERANCE`."""
    return difference(found, expected) <= TOLERANCE
