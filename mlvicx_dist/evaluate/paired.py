"""Encoders on the same images: areas, their differences, and intervals over the same patients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlvicx_dist.config import Bootstrap
from mlvicx_dist.evaluate.metrics import (
    Areas,
    auroc,
    average_precision,
    bootstrap_areas,
    bootstrap_means,
    interval,
    over_classes,
)

Scores = Mapping[str, np.ndarray]


def compare(
    scores: Scores,
    labels: np.ndarray,
    patients: np.ndarray,
    classes: Sequence[str],
    settings: Bootstrap,
    folds: np.ndarray | None = None,
) -> dict[str, Any]:
    """Areas of each encoder, and the first minus each other, a class and mean, with intervals.

    Args:
        scores: By encoder, [n, K].
        labels: [n, K], 0, 1 or NaN; every class has both.
        patients: [n].
        classes: Their names.
        settings: The resampling.
        folds: The fold of each image, [n]; None: all are compared.

    Returns:
        `auroc` and `auprc`, each for every encoder, `difference` (to the second) and `over_NAME`
        (to any further one) {class or "mean": {"value", "low", "high"}}; `undefined_draws`, {class:
        draws that held one label value only}, of which the intervals know nothing.
    """
    columns = range(len(classes))
    values, draws = {}, {}
    for name, one in scores.items():
        values[name] = Areas(
            *(
                np.array([area(one[:, k], labels[:, k], folds) for k in columns])
                for area in (auroc, average_precision)
            )
        )
        draws[name] = bootstrap_areas(
            one, labels, patients, folds, draws=settings.draws, seed=settings.seed
        )
    undefined = np.isnan(next(iter(draws.values())).auroc).sum(0)
    result: dict[str, Any] = {}
    for metric in Areas._fields:
        by_name = _with_differences(
            {name: (getattr(values[name], metric), getattr(draws[name], metric)) for name in scores}
        )
        result[metric] = {
            name: {
                **{c: _cell(areas[k], drawn[:, k], settings) for k, c in enumerate(classes)},
                "mean": _cell(areas.mean(), over_classes(drawn), settings),
            }
            for name, (areas, drawn) in by_name.items()
        }
    result["undefined_draws"] = {
        c: int(undefined[k]) for k, c in enumerate(classes) if undefined[k]
    }
    return result


def compare_means(
    values: Mapping[str, np.ndarray], patients: np.ndarray, settings: Bootstrap
) -> dict[str, dict[str, float]]:
    """Means over images, and the first minus each other, with intervals over the same patients.

    Args:
        values: By encoder, or what stands beside it, one an image, [n].
        patients: [n].
        settings: The resampling.

    Returns:
        For every name, `difference` (to the second) and `over_NAME` (to any further one)
        {"value", "low", "high"}.
    """
    by_name = {
        name: (
            one.mean(),
            bootstrap_means(one, patients, draws=settings.draws, seed=settings.seed),
        )
        for name, one in values.items()
    }
    return {
        name: _cell(float(mean), drawn, settings)
        for name, (mean, drawn) in _with_differences(by_name).items()
    }


Estimates = dict[str, tuple[Any, np.ndarray]]
"""By name, a value and its draws."""


def _with_differences(by_name: Estimates) -> Estimates:
    """The same with the first minus each other."""
    (_, (value, draws)), *others = by_name.items()
    result = dict(by_name)
    for place, (other, (its_value, its_draws)) in enumerate(others):
        name = f"over_{other}" if place else "difference"
        result[name] = value - its_value, draws - its_draws
    return result


def _cell(value: float, drawn: np.ndarray, settings: Bootstrap) -> dict[str, float]:
    low, high = interval(drawn, settings.confidence)
    return {"value": float(value), "low": low, "high": high}
