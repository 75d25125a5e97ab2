"""The floor: ridge regression on 24 x 24 pixels, which knows place and brightness and no more."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from mlvicx_dist.config import PIXELS, Probe
from mlvicx_dist.evaluate.probe import Data, Fitted, Solve, Weights, best_on, logistic

SIDE_PX = 24
PENALTIES = tuple(10.0**k for k in range(3, -4, -1))


class Pixels(nn.Module):
    """An image averaged to 24 x 24 pixels, in place of an encoder."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Grey images, uint8 [B, 1, H, W] -> float [B, 576] in [0, 1]."""
        return functional.adaptive_avg_pool2d(images.float() / 255, SIDE_PX).flatten(1)


def fit_for(
    name: str,
    features: np.ndarray,
    labels: np.ndarray,
    *,
    validation: Data,
    settings: Probe,
) -> Fitted:
    """The probe of an encoder, or ridge regression for `pixels`; see `fit_probe`."""
    return best_on(validation, solver_of(name, settings), (features, labels))


def solver_of(name: str, settings: Probe) -> Solve:
    """The regression of an encoder's probe, or ridge regression for `pixels`."""
    return ridge if name == PIXELS else logistic(settings)


def ridge(x: torch.Tensor, labels: torch.Tensor) -> Iterator[Weights]:
    """Ridge regression.

    Minimises |y - x w - b|^2 / (2 n) + l2 / 2 |w|^2 for each class over its n known labels.
    """
    known = ~labels.isnan()
    # Classes that know the same images share one matrix.
    masks, group = torch.unique(known, dim=1, return_inverse=True)
    parts = []
    for k in range(masks.shape[1]):
        rows, columns = masks[:, k], torch.nonzero(group == k).flatten()
        if not rows.any():
            # Nobody knows the class here: its weights stay zero.
            continue
        y = labels[rows][:, columns]
        mean_x, mean_y = x[rows].mean(0), y.mean(0)
        centred = x[rows] - mean_x
        square, product = centred.T @ centred / len(y), centred.T @ (y - mean_y) / len(y)
        parts.append((columns, mean_x, mean_y, square, product))
    for l2 in PENALTIES:
        weight = x.new_zeros(x.shape[1], labels.shape[1])
        bias = x.new_zeros(labels.shape[1])
        for columns, mean_x, mean_y, square, product in parts:
            damped = square + l2 * torch.eye(len(square), dtype=square.dtype)
            weight[:, columns] = torch.linalg.solve(damped, product)
            bias[columns] = mean_y - mean_x @ weight[:, columns]
        yield l2, weight, bias
