"""What a run's report shows."""

from __future__ import annotations

from statistics import median
from typing import Any

import yaml

from mlvicx_dist.config import METHODS, PretrainConfig, flat, to_tree
from mlvicx_dist.errors import DataError, UserError
from mlvicx_dist.evaluate.overlap import overlap_words
from mlvicx_dist.evaluate.tables import remarks, tables
from mlvicx_dist.progress import duration
from mlvicx_dist.report import charts
from mlvicx_dist.report.contact import contacts, for_page
from mlvicx_dist.storage import Place
from mlvicx_dist.stream.cache import cache_of
from mlvicx_dist.train.card import labels_read
from mlvicx_dist.train.left import left_json, left_settings
from mlvicx_dist.train.runlog import read_rows

CONTACT_IMAGES = 6
WITHOUT = "remove it: the page does without"


def of_run(run_dir: Place) -> dict[str, Any]:
    """The values of a run's page.

    Raises:
        DataError: the folder is no run.
    """
    try:
        config = left_settings(PretrainConfig, run_dir / "config.yaml")
    except FileNotFoundError:
        raise DataError(
            f"{run_dir}: it is no folder of a run, a sweep or a comparison (no config.yaml, "
            "sweep.yaml or compare.yaml in it); give storage_path/name."
        ) from None
    rows = read_rows(run_dir / "metrics.jsonl")
    pictures, why = _contact(config)
    return {
        "run_dir": run_dir,
        "config": config,
        "method": METHODS[config.method],
        "labels": labels_read(to_tree(config)),
        "changed": _changed(config),
        "settings": yaml.safe_dump(to_tree(config), sort_keys=False),
        "state": _state(run_dir, rows),
        "rows": rows,
        "charts": charts.of_run(rows, _heads(rows)) if rows else [],
        "evaluations": [
            _evaluation(path) for path in sorted((run_dir / "evaluations").glob("*.json"))
        ],
        "contact": pictures,
        "no_contact": why,
        "about": left_json(run_dir / "environment.json", remedy=WITHOUT) or {},
    }


def _evaluation(path: Place) -> dict[str, Any]:
    """What the page shows of an evaluation.

    Raises:
        DataError: it is damaged or cannot be read.
    """
    remedy = "evaluate again, or remove it"
    found = left_json(path, remedy=remedy) or {}
    try:
        return {
            "result": found,
            "charts": charts.of_evaluation(found),
            "tables": tables(found),
            "remarks": remarks(found),
            "overlap": overlap_words(found["overlap"]) if "overlap" in found else "",
        }
    except (KeyError, TypeError, AttributeError):
        raise DataError(f"{path}: the file is damaged; {remedy}.") from None


def _state(run_dir: Place, rows: list[dict[str, float]]) -> dict[str, Any]:
    """How far the run is, in words for the head of the page."""
    state = left_json(run_dir / "state.json", remedy=WITHOUT) or {}
    last = rows[-1] if rows else {}
    steps = int(state.get("steps", 0))
    return {
        "finished": state.get("state") == "finished",
        "step": int(last.get("step", 0)),
        "steps": steps,
        "epochs": last.get("epoch", 0.0),
        "images_per_s": _median([row["images_per_s"] for row in rows]),
        "data_wait": _median([row["data_wait"] for row in rows]),
        "time": duration(last.get("time_s", 0.0)),
    }


def _median(values: list[float]) -> float:
    return median(values) if values else 0.0


def _heads(rows: list[dict[str, float]]) -> list[str]:
    """The heads that the rows speak of, the global one first."""
    names = {key.split("/")[0] for row in rows[-1:] for key in row if key.endswith("/std")}
    return sorted(names - {"encoder"}, key=lambda name: (name != "global", name))


def _changed(config: PretrainConfig) -> list[tuple[str, Any, Any]]:
    """The settings that are not the defaults: key, value, default."""
    needed = {"kind": "pretrain", "run": {"name": "x"}, "data": {"shards": [{"path": "x"}]}}
    default = to_tree(PretrainConfig.model_validate(needed))
    found = []
    for section, values in to_tree(config).items():
        if section in ("run", "data") or not isinstance(values, dict):
            continue
        usual = flat(default[section], prefix=f"{section}.")
        for key, value in flat(values, prefix=f"{section}.").items():
            if value != usual.get(key):
                found.append((key, value, usual.get(key)))
    return found


def _contact(config: PretrainConfig) -> tuple[list[dict[str, str]], str]:
    """Images beside their views, or why there are none."""
    shown = contacts(
        [folder.path for folder in config.data.shards],
        config.views,
        count=CONTACT_IMAGES,
        splits=config.data.splits,
        cache=cache_of(config.data),
    )
    try:
        return [
            for_page(strip, caption=caption, alt=f"A stored image and its two views: {caption}")
            for strip, caption in shown
        ], ""
    except UserError as error:
        return [], str(error)
