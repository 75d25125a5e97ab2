"""What frozen embeddings can tell: a multi-label logistic regression and nearest neighbours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch.nn import functional

from mlvicx_dist.config import Knn, Probe
from mlvicx_dist.evaluate.metrics import auroc


@dataclass(frozen=True)
class Fitted:
    """A fitted probe: its weights on standardised embeddings, and how it was chosen."""

    mean: torch.Tensor
    std: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    l2: float
    validation_auroc: float

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Logits of every class, float64 [n, K]."""
        x = (torch.from_numpy(features).double() - self.mean) / self.std
        return (x @ self.weight + self.bias).numpy()


Data = tuple[np.ndarray, np.ndarray]
"""Embeddings [n, F] and labels [n, K], 0, 1 or NaN (masked)."""
Weights = tuple[float, torch.Tensor, torch.Tensor]
"""A penalty, and the weights [F, K] and biases [K] that it leads to."""
Solve = Callable[[torch.Tensor, torch.Tensor], Iterator[Weights]]
"""From standardised features [n, F] and labels [n, K] to the weights of each penalty, in order."""


def fit_probe(
    features: np.ndarray, labels: np.ndarray, *, validation: Data, settings: Probe
) -> Fitted:
    """Fit on the training images, and choose the penalty by mean AUROC on the validation images.

    Args:
        features: Embeddings of the training images, [n, F].
        labels: Their labels, [n, K], 0, 1 or NaN (masked).
        validation: Embeddings and labels of other patients.
        settings: Penalties and the most iterations.
    """
    return best_on(validation, logistic(settings), (features, labels))


def logistic(settings: Probe) -> Solve:
    """Multi-label logistic regression."""

    def solve(x: torch.Tensor, labels: torch.Tensor) -> Iterator[Weights]:
        # Penalised weights lie in the span of the images: of few images they are few numbers.
        basis = torch.linalg.qr(x.T).Q if len(x) < x.shape[1] else None
        x = x if basis is None else x @ basis
        start = torch.zeros(x.shape[1] + 1, labels.shape[1], dtype=torch.float64)
        # From the strongest penalty down: each start is near its end.
        for l2 in sorted(settings.l2, reverse=True):
            start = _minimise(x, labels, l2, start, settings.max_iterations)
            yield l2, start[:-1] if basis is None else basis @ start[:-1], start[-1]

    return solve


def best_on(validation: Data, solve: Solve, train: Data) -> Fitted:
    """The penalty with the best mean AUROC on the validation images; of equals the first."""
    best: Fitted | None = None
    for fitted in _each(validation, solve, train):
        if best is None or fitted.validation_auroc > best.validation_auroc:
            best = fitted
    assert best is not None
    return best


def best_in_turns(turns: Sequence[np.ndarray], solve: Solve, train: Data) -> Fitted:
    """The penalty with the best mean AUROC over the turns, fitted on all training images.

    Args:
        turns: Which training images a turn is judged by, bool [n]; it learns from the others.
        solve: The regression.
        train: The training images.
    """
    x, y = train
    found = np.array(
        [
            [one.validation_auroc for one in _each((x[t], y[t]), solve, (x[~t], y[~t]))]
            for t in turns
        ]
    )
    # A turn may hold no class with both labels.
    areas = np.nanmean(found, 0)
    best = int(np.argmax(areas))
    return replace(
        next(islice(_each(None, solve, train), best, None)), validation_auroc=float(areas[best])
    )


def _each(validation: Data | None, solve: Solve, train: Data) -> Iterator[Fitted]:
    """The probe of every penalty."""
    features, labels = train
    x, scale = standardised(features)
    for l2, weight, bias in solve(x, torch.from_numpy(labels).double()):
        fitted = Fitted(*scale, weight, bias, l2, float("nan"))
        if validation is not None:
            area = mean_auroc(fitted.scores(validation[0]), validation[1])
            fitted = replace(fitted, validation_auroc=area)
        yield fitted


def standardised(features: np.ndarray) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Features with mean 0 and standard deviation 1, float64 [n, F], and what they had, [F]."""
    x = torch.from_numpy(features).double()
    mean = x.mean(0)
    # One image has no deviation.
    std = (x.std(0) if len(x) > 1 else torch.ones_like(mean)).clamp_min(1e-9)
    return (x - mean) / std, (mean, std)


def _minimise(
    x: torch.Tensor, labels: torch.Tensor, l2: float, start: torch.Tensor, iterations: int
) -> torch.Tensor:
    """Mean masked cross-entropy + l2 / 2 ||w||^2 by L-BFGS; the bias is free. [F + 1, K]."""
    known = ~labels.isnan()
    targets = labels.nan_to_num()
    counts = known.sum(0).clamp_min(1)
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=iterations,
        history_size=20,
        tolerance_grad=1e-7,
        # By default it ends when the loss stands still in its ninth digit: scores then err by 2e-4.
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logits = x @ weights[:-1] + weights[-1]
        each = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        loss = ((each * known).sum(0) / counts).sum() + l2 / 2 * weights[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def knn_scores(
    features: np.ndarray, labels: np.ndarray, queries: np.ndarray, *, settings: Knn
) -> np.ndarray:
    """The share of positives among the nearest training images, weighted by cosine similarity.

    Args:
        features: Embeddings of the training images, [n, F].
        labels: Their labels, [n, K]; NaN has no vote.
        queries: Embeddings to score, [m, F].
        settings: How many neighbours.

    Returns:
        Scores, float64 [m, K].
    """
    x, y = torch.from_numpy(features).double(), torch.from_numpy(labels).double()
    mean = x.mean(0)
    bank = functional.normalize(x - mean, dim=1)
    scores = []
    for part in torch.from_numpy(queries).double().split(1024):
        near = (functional.normalize(part - mean, dim=1) @ bank.T).topk(
            min(settings.neighbours, len(bank)), dim=1
        )
        votes = y[near.indices]
        # Cosine lies in [-1, 1]: shifted, so that no vote counts against its label.
        weights = (1 + near.values)[:, :, None] * ~votes.isnan()
        scores.append((weights * votes.nan_to_num()).sum(1) / weights.sum(1).clamp_min(1e-12))
    return torch.cat(scores).numpy()


def mean_auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The mean over the classes that have both labels."""
    areas = [auroc(scores[:, k], labels[:, k]) for k in range(labels.shape[1])]
    defined = [area for area in areas if not np.isnan(area)]
    return float(np.mean(defined)) if defined else float("nan")
