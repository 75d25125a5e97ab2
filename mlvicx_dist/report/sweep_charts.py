"""The charts of a sweep, as plotly figures in JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna

from mlvicx_dist.report.charts import GREY, PALETTE, Chart, chart, log_axis
from mlvicx_dist.tune.records import Record
from mlvicx_dist.tune.space import Space, coded, new_study, short, worded

STATES = {
    "finished": (PALETTE[0], "circle", ""),
    "pruned": (GREY, "x", "/"),
    "diverged": (PALETTE[1], "triangle-up", "x"),
    "failed": (PALETTE[3], "square", "-"),
    "running": (PALETTE[4], "diamond", "."),
}
"""By how a trial stands: its colour, its marker and the pattern of its bar."""
THIRDS = 3
LEAST_FOR_IMPORTANCE = 8
MOST_TICKS = 12


def of_records(
    records: Sequence[Record], space: Space, step: int, leader: Record | None
) -> list[Chart]:
    """All charts; `step` is where all trials are compared."""
    compared = [record for record in records if record.at(step) is not None]
    figures = [_curves(records, leader), _timeline(records), _parallel(compared, space, step)]
    importance = _importance(compared, space, step)
    return [
        *figures,
        *importance,
        *(_against(compared, space, key, step) for key in space.dimensions),
    ]


def _curves(records: Sequence[Record], leader: Record | None) -> Chart:
    traces = []
    first = {record.state: record for record in reversed(records)}
    for record in records:
        ahead = record is leader
        colour, symbol, _ = STATES[record.state]
        traces.append(
            {
                "x": [look.step for look in record.looks],
                "y": [look.target for look in record.looks],
                "name": record.state,
                "meta": f"trial {record.name}, {record.state}",
                "mode": "lines+markers",
                "opacity": 1.0 if ahead else 0.55,
                "line": {"color": colour, "width": 3.5 if ahead else 1.5},
                "marker": {"size": 6, "symbol": symbol},
                "legendgroup": record.state,
                "showlegend": record is first[record.state],
                "hovertemplate": f"trial {record.name}: %{{y:.4f}} at step %{{x}}",
            }
        )
    layout = {
        "xaxis": {"title": {"text": "step"}},
        "yaxis": {"title": {"text": "target"}},
        "showlegend": True,
        "height": 340,
    }
    return chart("Target of every trial; the best one is bold", traces, layout)


def _timeline(records: Sequence[Record]) -> Chart:
    """Who ran when, and where a rung stopped it."""
    traces = []
    for state, (colour, _, pattern) in STATES.items():
        chosen = [record for record in records if record.state == state]
        if chosen:
            traces.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "name": state,
                    "y": [record.number for record in chosen],
                    "base": [record.began_s / 60 for record in chosen],
                    "x": [(record.until_s - record.began_s) / 60 for record in chosen],
                    "width": 0.8,
                    "marker": {"color": colour, "pattern": {"shape": pattern, "size": 5}},
                    "hovertemplate": "trial %{y}: %{x:.1f} min<extra></extra>",
                }
            )
    layout = {
        "xaxis": {"title": {"text": "minutes of sweeping"}, "zeroline": False},
        "yaxis": {
            "title": {"text": "trial"},
            "range": [max(record.number for record in records) + 0.5, -0.5],
            "dtick": -(-len(records) // MOST_TICKS),
            "zeroline": False,
        },
        "barmode": "overlay",
        "showlegend": True,
        "height": 340,
    }
    return chart("When each trial ran, and how it ended", traces, layout)


def _parallel(records: Sequence[Record], space: Space, step: int) -> Chart:
    """Parallel coordinates, as plain lines: plotly's own kind needs WebGL, which may be missing.

    Each axis runs from 0 to 1; a setting that has no effect in a trial stands below its axis.
    """
    keys = list(space.dimensions)
    targets = [record.at(step) or 0.0 for record in records]
    low, high = min(targets, default=0.0), max(targets, default=1.0)
    span = high - low or 1.0
    labels = [short(key, keys) for key in keys]
    names = [*labels, f"target at step {step}"]
    traces: list[dict[str, Any]] = []
    for target, record in sorted(zip(targets, records, strict=True), key=lambda pair: pair[0]):
        share = (target - low) / span
        shown = [worded(record.point.get(key, "off")) for key in keys] + [f"{target:.4f}"]
        traces.append(
            {
                "x": names,
                "y": [*(_height(space, key, record.point) for key in keys), share],
                "text": shown,
                "name": f"trial {record.name}",
                "mode": "lines+markers",
                "opacity": 0.25 + 0.75 * share,
                "line": {"color": PALETTE[0], "width": 1 + 2.5 * share, "shape": "spline"},
                "marker": {"size": 5},
                "hovertemplate": "%{x}: %{text}",
            }
        )
    ends = [[worded(value) for value in space.dimensions[key].ends()] for key in keys]
    notes = [
        note
        for name, end in zip(names, [*ends, [f"{low:.3f}", f"{high:.3f}"]], strict=True)
        for note in (
            {"x": name, "y": -0.03, "text": end[0], "yanchor": "top"},
            {"x": name, "y": 1.03, "text": end[-1], "yanchor": "bottom"},
        )
    ]
    layout = {
        "annotations": [{**note, "showarrow": False} for note in notes],
        "xaxis": {"title": {"text": "setting"}, "type": "category"},
        "yaxis": {
            "title": {"text": "from its least to its most"},
            "showticklabels": False,
            "showgrid": False,
            "zeroline": False,
            "range": [-0.22, 1.14],
        },
        "showlegend": False,
        "height": 400,
    }
    return chart(
        "Every trial as a line; the better its target, the stronger",
        traces,
        layout,
        wide=True,
    )


def _height(space: Space, key: str, point: Mapping[str, Any]) -> float:
    """Where a value stands on its axis, from 0 to 1."""
    if key not in point:
        return -0.14
    dimension = space.dimensions[key]
    if dimension.choice is not None:
        place = [coded(value) for value in dimension.choice].index(coded(point[key]))
        return place / max(len(dimension.choice) - 1, 1)
    low, high = dimension.ends()
    value = float(point[key])
    if dimension.log_uniform is not None:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return (value - low) / (high - low)


def _importance(records: Sequence[Record], space: Space, step: int) -> list[Chart]:
    """PED-ANOVA (Watanabe et al. 2023) of what tells the better trials from all."""
    shared = [key for key in space.dimensions if all(key in r.point for r in records)]
    varied = [key for key in shared if len({coded(r.point[key]) for r in records}) > 1]
    if len(records) < LEAST_FOR_IMPORTANCE or not varied:
        return []
    study = new_study()
    distributions = space.distributions()
    for record in records:
        study.add_trial(
            optuna.trial.create_trial(
                value=record.at(step),
                params={key: space.parameters(record.point)[key] for key in varied},
                distributions={key: distributions[key] for key in varied},
            )
        )
    shares = optuna.importance.get_param_importances(
        study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
    )
    names = list(shares)[::-1]
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": [shares[name] for name in names],
        "y": [short(name, space.dimensions) for name in names],
        "marker": {"color": PALETTE[0]},
        "hovertemplate": "%{y}: %{x:.2f}<extra></extra>",
    }
    layout = {
        "xaxis": {"title": {"text": "share (PED-ANOVA)"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": ""}, "showgrid": False},
        "showlegend": False,
        "height": 340,
    }
    return [chart(f"What mattered, by {len(records)} trials at step {step}", [trace], layout)]


def _against(records: Sequence[Record], space: Space, key: str, step: int) -> Chart:
    """The target against one setting: each trial, and mean and spread of groups of them."""
    dimension = space.dimensions[key]
    having = sorted((r for r in records if key in r.point), key=lambda r: coded(r.point[key]))
    if dimension.choice is not None:
        groups = [
            [r for r in having if coded(r.point[key]) == coded(value)] for value in dimension.choice
        ]
    else:
        having.sort(key=lambda record: float(record.point[key]))
        groups = [list(part) for part in np.array_split(np.array(having, dtype=object), THIRDS)]
    groups = [group for group in groups if group]

    def x(record: Record) -> Any:
        value = record.point[key]
        return worded(value) if dimension.choice is not None else value

    traces: list[dict[str, Any]] = [
        {
            "x": [x(r) for r in having if r.state == state],
            "y": [r.at(step) for r in having if r.state == state],
            "name": state,
            "mode": "markers",
            "marker": {"color": colour, "symbol": symbol, "size": 8},
            "hovertemplate": "%{y:.4f} at %{x}",
        }
        for state, (colour, symbol, _) in STATES.items()
        if any(r.state == state for r in having)
    ]
    targets = [np.array([r.at(step) for r in group], dtype=float) for group in groups]
    traces.append(
        {
            "x": [x(group[len(group) // 2]) for group in groups],
            "y": [float(values.mean()) for values in targets],
            "error_y": {
                "type": "data",
                "array": [float(v.std(ddof=1)) if len(v) > 1 else 0.0 for v in targets],
                "thickness": 1.5,
            },
            "name": "mean and std",
            "mode": "markers",
            "marker": {"symbol": "line-ew-open", "size": 16, "color": PALETTE[2]},
            "hovertemplate": "mean %{y:.4f}",
        }
    )
    axis: dict[str, Any] = {"type": "linear"}
    if dimension.choice is not None:
        order = [worded(value) for value in dimension.choice]
        axis = {"type": "category", "categoryorder": "array", "categoryarray": order}
    elif dimension.log_uniform is not None:
        axis = log_axis(*dimension.log_uniform)
    layout = {
        "xaxis": {"title": {"text": short(key, space.dimensions)}, **axis},
        "yaxis": {"title": {"text": f"target at step {step}"}},
        "showlegend": True,
    }
    return chart(f"Target against {short(key, space.dimensions)}", traces, layout)
