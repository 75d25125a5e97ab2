"""What a run's report shows."""

from __future__ import annotations

import json
from typing import Any

import yaml

from mlvicx_dist.config import METHODS, PretrainConfig, parse_config, parse_yaml, to_tree
from mlvicx_dist.errors import ConfigError, DataError, UserError
from mlvicx_dist.evaluate.overlap import overlap_words
from mlvicx_dist.evaluate.tables import remarks, tables
from mlvicx_dist.progress import duration
from mlvicx_dist.report import charts
from mlvicx_dist.report.contact import contacts, for_page
from mlvicx_dist.storage import Place, read_bytes
from mlvicx_dist.train.runlog import read_rows, trained_s

CONTACT_IMAGES = 6


def of_run(run_dir: Place) -> dict[str, Any]:
    """The values of a run's page.

    Raises:
        DataError: the folder is no run.
    """
    path = run_dir / "config.yaml"
    try:
        config = parse_config(parse_yaml(read_bytes(path).decode(), str(path)), str(path))
        assert isinstance(config, PretrainConfig)
    except (OSError, ValueError, AssertionError, ConfigError):
        raise DataError(
            f"{run_dir}: it is no folder of a run, a sweep or a comparison (no config.yaml, "
            "sweep.yaml or compare.yaml in it); give storage_path/name."
        ) from None
    rows = read_rows(run_dir / "metrics.jsonl")
    evaluations = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((run_dir / "evaluations").glob("*.json"))
    ]
    return {
        "run_dir": run_dir,
        "config": config,
        "method": METHODS[config.method],
        "changed": _changed(config),
        "settings": yaml.safe_dump(to_tree(config), sort_keys=False),
        "state": _state(run_dir, rows),
        "rows": rows,
        "charts": charts.of_run(rows, _heads(rows)) if rows else [],
        "evaluations": [
            {
                "result": e,
                "charts": charts.of_evaluation(e),
                "tables": tables(e),
                "remarks": remarks(e),
                "overlap": overlap_words(e["overlap"]) if "overlap" in e else "",
            }
            for e in evaluations
        ],
        "contact": _contact(config),
        "about": _json(run_dir / "environment.json"),
    }


def _json(path: Place) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _state(run_dir: Place, rows: list[dict[str, float]]) -> dict[str, Any]:
    """How far the run is, in words for the head of the page."""
    state = _json(run_dir / "state.json")
    last = rows[-1] if rows else {}
    steps = int(state.get("steps", 0))
    return {
        "finished": state.get("state") == "finished",
        "step": int(last.get("step", 0)),
        "steps": steps,
        "epochs": last.get("epoch", 0.0),
        "images_per_s": _median([row["images_per_s"] for row in rows]),
        "data_wait": _median([row["data_wait"] for row in rows]),
        "time": duration(trained_s(rows)),
    }


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


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
        for key, value in _leaves(values, section):
            usual = dict(_leaves(default[section], section)).get(key)
            if value != usual:
                found.append((key, value, usual))
    return found


def _leaves(tree: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for key, value in tree.items():
        name = f"{prefix}.{key}"
        leaves += _leaves(value, name) if isinstance(value, dict) else [(name, value)]
    return leaves


def _contact(config: PretrainConfig) -> list[dict[str, str]]:
    """Images beside their views, or nothing where the shards are no longer there."""
    try:
        folders = [folder.path for folder in config.data.shards]
        return [
            for_page(strip, caption=caption, alt=f"A stored image and its two views: {caption}")
            for strip, caption in contacts(folders, config.views, count=CONTACT_IMAGES)
        ]
    except UserError:
        return []
