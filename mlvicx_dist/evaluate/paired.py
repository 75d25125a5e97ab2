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
) -> dict[str, Any]:
    """Areas of each encoder, and the first minus each other, a class and mean, with intervals.

    Args:
        scores: By encoder, [n, K].
        labels: [n, K], 0, 1 or NaN; every class has both.
        patients: [n].
        classes: Their names.
        settings: The resampling.

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
                np.array([area(one[:, k], labels[:, k]) for k in columns])
                for area in (auroc, average_precision)
            )
        )
        draws[name] = bootstrap_areas(
            one, labels, patients, draws=settings.draws, seed=settings.seed
        )
    first, *others = scores
    undefined = np.isnan(draws[first].auroc).sum(0)
    result: dict[str, Any] = {}
    for metric in Areas._fields:
        by_name = {
            name: (getattr(values[name], metric), getattr(draws[name], metric)) for name in scores
        }
        for other in others:
            name = "difference" if other == others[0] else f"over_{other}"
            by_name[name] = (
                by_name[first][0] - by_name[other][0],
                by_name[first][1] - by_name[other][1],
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


def _cell(value: float, drawn: np.ndarray, settings: Bootstrap) -> dict[str, float]:
    low, high = interval(drawn, settings.confidence)
    return {"value": float(value), "low": low, "high": high}
