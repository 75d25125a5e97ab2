"""The charts of a comparison's page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mlvicx_dist.evaluate.task import Images, Scores
from mlvicx_dist.report.charts import (
    PALETTE,
    SYMBOLS,
    Chart,
    chart,
    differences,
    roc,
    stroke,
    whiskers,
)

MOST_POINTS = 1500
"""Images that a map of embeddings shows."""


def of_task(task: Mapping[str, Any], reference: str) -> list[Chart]:
    """Differences to the reference, label efficiency and ROC curves of a task."""
    charts = []
    axis = "difference in AUROC"
    apart = task["difference"]["auroc"]
    if apart:
        of_mean = {name: cells["mean"] for name, cells in apart.items()}
        charts.append(differences(f"Mean AUROC, minus {reference}", of_mean, axis))
    charts.append(_roc(task))
    if any("methods" in share for share in task["few_labels"]):
        charts.append(_few(task["few_labels"]))
    of_groups = {
        f"{name}, {group}": one["difference"][name]
        for name in apart
        for group, one in task["subgroups"].items()
        if name in one.get("difference", {})
    }
    if of_groups:
        charts.append(differences(f"Mean AUROC in subgroups, minus {reference}", of_groups, axis))
    return charts


def _few(shares: list[Mapping[str, Any]]) -> Chart:
    """The mean AUROC of each method over the share of labels; a share lies beside its likes."""
    judged = [share for share in shares if "methods" in share]
    traces = []
    for place, name in enumerate(judged[0]["methods"]):
        cells = [share["methods"][name] for share in judged]
        traces.append(
            {
                # Beside each other, so that no interval hides another.
                "x": [100 * share["fraction"] * 1.03**place for share in judged],
                "y": [cell["value"] for cell in cells],
                "error_y": {**whiskers(cells), "thickness": 1},
                "name": name,
                "mode": "lines+markers",
                "line": stroke(place),
                "marker": {"symbol": SYMBOLS[place % len(SYMBOLS)], "size": 8},
                "hovertemplate": "%{y:.3f} at %{x:.3g} %",
            }
        )
    layout = {
        "xaxis": {
            "title": {"text": "% of the training patients"},
            "type": "log",
            "tickvals": [100 * share["fraction"] for share in judged],
            "ticktext": [f"{100 * share['fraction']:g}" for share in judged],
        },
        "yaxis": {"title": {"text": "mean AUROC"}},
        "height": 340,
        "showlegend": True,
    }
    return chart("Label efficiency", traces, layout)


def _roc(task: Mapping[str, Any]) -> Chart:
    curves = [
        (curve, stroke(place), {"name": f"{name} {task['auroc'][name]['mean']['value']:.3f}"})
        for place, (name, curve) in enumerate(task["roc"].items())
    ]
    return roc("ROC, mean over classes and seeds", curves)


def of_plane(name: str, scores: Scores, images: Images) -> Chart:
    """The test images in the plane of their embeddings' two principal components."""
    column = int(np.nanargmax(np.nansum(images.labels, axis=0)))
    label = images.classes[column]
    shown = np.sort(np.random.default_rng(0).permutation(len(images.labels))[:MOST_POINTS])
    points, values = scores.plane[shown], images.labels[shown, column]
    traces = [
        {
            "x": [round(float(x), 3) for x in points[chosen, 0]],
            "y": [round(float(y), 3) for y in points[chosen, 1]],
            "name": words,
            "mode": "markers",
            "marker": {"color": color, "symbol": symbol, "size": 6, "opacity": 0.75},
            "hovertemplate": "%{x:.2f}, %{y:.2f}",
        }
        for words, value, color, symbol in (
            (f"no {label}", 0, PALETTE[0], "circle"),
            (label, 1, PALETTE[1], "x"),
        )
        if (chosen := values == value).any()
    ]
    layout = {
        "xaxis": {"title": {"text": "first principal component"}, "zeroline": False},
        "yaxis": {
            "title": {"text": "second principal component"},
            "zeroline": False,
            # A distance is one whichever way it lies.
            "scaleanchor": "x",
        },
        "height": 340,
        "showlegend": True,
    }
    return chart(name, traces, layout)
