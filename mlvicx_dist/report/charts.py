"""The charts of a report, as plotly figures in JSON; the page draws them in its own colours."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "--ink")
"""Okabe and Ito's, which the colour-blind tell apart, without the yellow that white paper swallows.

`--ink` is their black, which the page turns into the colour of its text.
"""
GREY = "#7F7F7F"
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down")
MOST_NAMES = 14
"""Traces that a chart's alternative text names."""
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
        charts.append(
            _lines("Standard deviation of the embeddings", "standard deviation", rows, stds)
        )
    charts += [
        _lines(
            "Effective rank of the encoder's output (RankMe)",
            "effective rank, in dimensions",
            rows,
            {"rank": "encoder/rankme"},
        ),
        _lines("Throughput", "images/s", rows, {"images/s": "images_per_s"}),
        _lines("Time waiting for data", "share of the time", rows, {"data wait": "data_wait"}),
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
            "line": stroke(place),
            "hovertemplate": "%{y:.4g}",
        }
        for place, (name, key) in enumerate(keys.items())
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
    axis: str = "gain in AUROC",
) -> Chart:
    """Differences with their intervals, one below the other; `axis` says of what."""
    names, cells = list(by_name), list(by_name.values())
    between = "[%{customdata[0]:.3f}, %{customdata[1]:.3f}]"
    trace = {
        "x": [cell["value"] for cell in cells],
        "y": names,
        "error_x": {**whiskers(cells), "color": PALETTE[0], "thickness": 2},
        "customdata": [[cell["low"], cell["high"]] for cell in cells],
        "mode": "markers",
        "marker": {"color": PALETTE[0], "size": 9},
        "hovertemplate": f"%{{y}}: %{{x:+.3f}} {between}<extra></extra>",
    }
    layout = {
        "xaxis": {"title": {"text": axis}, "zeroline": True},
        "yaxis": {"title": {"text": ""}, "autorange": "reversed", "showgrid": False},
        "showlegend": False,
        "height": 110 + 34 * len(names),
    }
    return chart(title, [trace], layout)


def _roc(result: Mapping[str, Any]) -> Chart:
    """A class has one colour and dash; the untrained encoder's curve is thin and in its group."""
    curves = []
    for kind, width in (("pretrained", 2.5), ("untrained", 1)):
        for place, name in enumerate(result["classes"]):
            area = result["probe"][kind][name]["value"]
            more = {
                "name": f"{name}, {kind} {area:.3f}" if width == 1 else f"{name} {area:.3f}",
                "legendgroup": name,
                "showlegend": kind == "pretrained",
            }
            curves.append((result["roc"][kind][name], stroke(place, width=width), more))
    return roc("ROC of the linear probe; thin: the same encoder untrained", curves)


def roc(
    title: str, curves: Sequence[tuple[Mapping[str, Any], dict[str, Any], dict[str, Any]]]
) -> Chart:
    """ROC curves: each its rates `false` and `true`, its line, and its name and other keys."""
    traces = [
        {
            "x": curve["false"],
            "y": curve["true"],
            "mode": "lines",
            "line": line,
            "hovertemplate": "%{y:.2f} at %{x:.2f}",
            **more,
        }
        for curve, line, more in curves
    ]
    layout = {
        "xaxis": {"title": {"text": "false positive rate"}, "range": [0, 1]},
        "yaxis": {"title": {"text": "true positive rate"}, "range": [0, 1.01]},
        "height": 340,
        "showlegend": True,
    }
    return chart(title, traces, layout)


def stroke(place: int, *, width: float = 2) -> dict[str, Any]:
    """The line of the trace at a place: colour and dash together tell 42 apart."""
    color, dash = PALETTE[place % len(PALETTE)], DASHES[place % len(DASHES)]
    return {"color": color, "dash": dash, "width": width}


def log_axis(low: float, high: float) -> dict[str, Any]:
    """An axis whose labels are the 1, 2 and 5 of each power of ten between two values."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    labels = [float(f"{digit}e{power}") for power in powers for digit in (1, 2, 5)]
    return {"type": "log", "tickvals": labels, "ticktext": [f"{label:g}" for label in labels]}


def whiskers(cells: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Error bars from the `low` to the `high` of each cell."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [cell["high"] - cell["value"] for cell in cells],
        "arrayminus": [cell["value"] - cell["low"] for cell in cells],
        "width": 0,
    }


def chart(
    title: str, traces: list[dict[str, Any]], layout: dict[str, Any], *, wide: bool = False
) -> Chart:
    """A chart for the page, with words for those who do not see it.

    A '<' in it cannot end the script that it stands in.
    """
    figure = json.dumps({"data": traces, "layout": layout}).replace("<", "\\u003c")
    axes = " against ".join(
        text for axis in ("yaxis", "xaxis") if (text := layout[axis]["title"]["text"])
    )
    names = [trace["name"] for trace in traces if trace.get("showlegend", True) and "name" in trace]
    of_what = f" of {', '.join(names)}" if 1 < len(names) <= MOST_NAMES else ""
    alt = f"Chart: {title}. {axes}{of_what}. Its values are in the table below it."
    return {"title": title, "figure": figure, "wide": wide, "alt": alt}
