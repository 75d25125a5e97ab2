"""Variance, invariance and covariance of one pair of embeddings (DESIGN 4.1), unweighted."""

from __future__ import annotations

from typing import NamedTuple

import torch

EPSILON = 1e-4


class Terms(NamedTuple):
    """The three terms, each a scalar."""

    invariance: torch.Tensor
    variance: torch.Tensor
    covariance: torch.Tensor


def vic_terms(a: torch.Tensor, b: torch.Tensor) -> Terms:
    """The unweighted terms of two views' embeddings.

    Args:
        a: Embeddings of view 1, [N, D].
        b: Embeddings of view 2, [N, D].

    Returns:
        invariance: mean((a - b)^2); variance: the mean of the two hinges, as VICReg and lightly
        halve it; covariance: the sum of the two penalties. At least float32 whatever autocast says.

    Raises:
        ValueError: the shapes differ, or N < 2.
    """
    if a.shape != b.shape or a.ndim != 2 or len(a) < 2:
        raise ValueError(f"two [N, D] with N >= 2 are needed, not {[*a.shape]} and {[*b.shape]}")
    with torch.autocast(a.device.type, enabled=False):
        a, b = (x if x.dtype == torch.float64 else x.float() for x in (a, b))
        hinges, penalties = zip(*(_spread(x) for x in (a, b)), strict=True)
        return Terms(
            invariance=(a - b).square().mean(),
            variance=(hinges[0] + hinges[1]) / 2,
            covariance=penalties[0] + penalties[1],
        )


def _spread(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The variance hinge and the covariance penalty of one view.

    Penalty: sum_{i != j} C_ij^2 / D = (||Z Z'||_F^2 / (N-1)^2 - sum_j var_j^2) / D with Z centred
    (DESIGN 3.4); the N x N or the D x D product, whichever is smaller.
    """
    count, width = z.shape
    z = z - z.mean(0)
    variances = z.square().sum(0) / (count - 1)
    hinge = torch.relu(1 - (variances + EPSILON).sqrt()).mean()
    gram = z @ z.T if count < width else z.T @ z
    penalty = (gram.square().sum() / (count - 1) ** 2 - variances.square().sum()) / width
    return hinge, penalty
