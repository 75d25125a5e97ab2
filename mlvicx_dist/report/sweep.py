"""What a sweep's report shows: its trials, what mattered, and the last word on the best one."""

from __future__ import annotations

from collections import Counter
from typing import Any

from mlvicx_dist.config import SweepConfig
from mlvicx_dist.progress import duration
from mlvicx_dist.report import sweep_charts
from mlvicx_dist.storage import Place
from mlvicx_dist.train.left import left_json, left_settings, left_text
from mlvicx_dist.tune.records import Record, Records, best, looks_share
from mlvicx_dist.tune.space import Space, open_space, short, worded

SETTINGS = "sweep.yaml"
TARGETS = {
    "probe": "mean AUROC of a linear probe",
    "knn": "mean AUROC of nearest neighbours",
    "effective_rank": "effective rank (RankMe)",
}


def of_sweep(folder: Place) -> dict[str, Any]:
    """The values of a sweep's page.

    Raises:
        DataError: its settings or records cannot be read.
    """
    config, space = _opened(folder)
    records = Records.read(folder / "trials").all()
    step = common_step(records)
    leader = best(records)
    keys = list(space.dimensions)
    confirmed = left_json(
        folder / "confirm.json", remedy="remove it and run the sweep's command again"
    )
    return {
        "folder": folder,
        "config": config,
        "records": sorted(records, key=lambda r: (-r.reached, -(r.target or 0.0))),
        "keys": keys,
        "columns": ["trial", "state", "step", "target", *(short(key, keys) for key in keys)],
        "counts": Counter(record.state for record in records),
        "best": leader,
        "best_yaml": left_text(folder / "best.yaml") if leader else "",
        "confirmed": confirmed,
        "confirmed_heads": ["configuration", *_seeds(confirmed), "mean"],
        "target": TARGETS[config.target.kind],
        "step": step,
        "time": duration(max((record.until_s for record in records), default=0.0)),
        "looks": looks_share(records),
        "worded": worded,
        "charts": sweep_charts.of_records(records, space, step, leader) if step else [],
        "settings": left_text(folder / SETTINGS),
    }


def common_step(records: list[Record]) -> int:
    """The last step at which most trials that were looked at at all were looked at; 0: none.

    Trials that a rung stopped have no later target, and an earlier one says less: here all can be
    compared alike.
    """
    counts = Counter(look.step for record in records for look in record.looks)
    most = max(counts.values(), default=0)
    return max((step for step, count in counts.items() if count == most), default=0)


def _opened(folder: Place) -> tuple[SweepConfig, Space]:
    config = left_settings(SweepConfig, folder / SETTINGS)
    return config, open_space(config)


def _seeds(confirmed: Any) -> list[str]:
    return [f"seed {seed}" for seed in confirmed["seeds"]] if confirmed else []
