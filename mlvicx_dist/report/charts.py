"""The charts of a report, as plotly figures in JSON; the page draws them in its own colours."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#999999")
"""Okabe and Ito's, which the colour-blind tell apart."""
TERMS = ("invariance", "variance", "covariance")

Row = Mapping[str, float]
Chart = dict[str, Any]


def of_run(rows: Sequence[Row], heads: Sequence[str]) -> list[Chart]:
    """The curves of a training run."""
    charts = [_lines("Loss", "loss", rows, {"loss": "loss"})]
    for head in heads:
        keys = {term: f"{head}/{term}_weighted" for term in TERMS}
        if keys["variance"] in rows[-1]:
            charts.append(_lines(f"Weighted terms, {head}", "weighted term", rows, keys))
    if stds := {head: f"{head}/std" for head in heads}:
        charts.append(_lines("Standard deviation of the embeddings", "std", rows, stds))
    charts += [
        _lines(
            "Effective rank of the encoder's output (RankMe)",
            "rank",
            rows,
            {"rank": "encoder/rankme"},
        ),
        _lines("Throughput", "images/s", rows, {"images/s": "images_per_s"}),
        _lines("Share of time waiting for data", "share", rows, {"data wait": "data_wait"}),
        _lines("Learning rate", "learning rate", rows, {"learning rate": "learning_rate"}),
    ]
    return charts


def of_evaluation(result: Mapping[str, Any]) -> list[Chart]:
    """Differences of classes, subgroups and shares with their intervals, and the ROC curves."""
    of_classes = {
        name: result["probe"]["difference"][name] for name in [*result["classes"], "mean"]
    }
    of_groups = {
        name: one["difference"]["mean"]
        for name, one in result.get("subgroups", {}).items()
        if "difference" in one
    }
    of_shares = {
        f"{one['fraction']:.1%} of patients": one["difference"]
        for one in result.get("few_labels", [])
        if "difference" in one
    }
    charts = [differences("What pretraining adds", of_classes), _roc(result)]
    if of_groups:
        charts.append(differences("What it adds in subgroups, mean", of_groups))
    if of_shares:
        charts.append(differences("What it adds with few labels, mean", of_shares))
    return charts


def _lines(title: str, unit: str, rows: Sequence[Row], keys: Mapping[str, str]) -> Chart:
    steps = [row["step"] for row in rows]
    traces = [
        {
            "x": steps,
            "y": [row.get(key) for row in rows],
            "name": name,
            "mode": "lines" if len(rows) > 1 else "markers",
            "line": {"color": color, "width": 2},
            "hovertemplate": "%{y:.4g}",
        }
        for (name, key), color in zip(keys.items(), PALETTE, strict=False)
    ]
    layout = {
        "xaxis": {"title": {"text": "step"}},
        "yaxis": {"title": {"text": unit}, "rangemode": "tozero"},
        "hovermode": "x unified",
        "showlegend": len(keys) > 1,
    }
    return chart(title, traces, layout)


def differences(
    title: str,
    by_name: Mapping[str, Mapping[str, float]],
    axis: str = "AUROC, pretrained minus untrained",
) -> Chart:
    """Differences with their intervals, one below the other; `axis` says of what."""
    names, cells = list(by_name), list(by_name.values())
    trace = {
        "x": [cell["value"] for cell in cells],
        "y": names,
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [cell["high"] - cell["value"] for cell in cells],
            "arrayminus": [cell["value"] - cell["low"] for cell in cells],
            "color": PALETTE[0],
            "thickness": 2,
            "width": 0,
        },
        "mode": "markers",
        "marker": {"color": PALETTE[0], "size": 9},
        "hovertemplate": "%{y}: %{x:+.3f}<extra></extra>",
    }
    layout = {
        "xaxis": {"title": {"text": axis}, "zeroline": True},
        "yaxis": {"autorange": "reversed", "showgrid": False, "automargin": True},
        "showlegend": False,
        "height": 110 + 34 * len(names),
    }
    return chart(title, [trace], layout)


def _roc(result: Mapping[str, Any]) -> Chart:
    traces = []
    for kind, dash in (("pretrained", "solid"), ("untrained", "dot")):
        for place, name in enumerate(result["classes"]):
            curve = result["roc"][kind][name]
            area = result["probe"][kind][name]["value"]
            traces.append(
                {
                    "x": curve["false"],
                    "y": curve["true"],
                    "name": f"{name}, {kind} {area:.3f}",
                    "legendgroup": name,
                    "mode": "lines",
                    "line": {
                        "color": PALETTE[place % len(PALETTE)],
                        "dash": dash,
                        "width": 2,
                    },
                    "hovertemplate": "%{y:.2f} at %{x:.2f}",
                }
            )
    layout = {
        "xaxis": {"title": {"text": "false positive rate"}, "range": [0, 1]},
        "yaxis": {"title": {"text": "true positive rate"}, "range": [0, 1.01]},
        "height": 420,
        "showlegend": True,
    }
    return chart("ROC of the linear probe", traces, layout)


def chart(
    title: str, traces: list[dict[str, Any]], layout: dict[str, Any], *, wide: bool = False
) -> Chart:
    """A chart for the page: '<' cannot end the script that it stands in."""
    figure = json.dumps({"data": traces, "layout": layout}).replace("<", "\\u003c")
    return {"title": title, "figure": figure, "wide": wide}
