"""An encoder as a folder that others load: safetensors, config.json and a model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlvicx_dist.errors import CheckpointError
from mlvicx_dist.model.encoder import save_export
from mlvicx_dist.train.checkpoint import find_weights, load_encoder, training_settings


def export(source: str | Path, out: str | Path) -> Path:
    """Write the encoder of a run or checkpoint to the folder `out`.

    The model card carries the evaluations that the run's folder holds.

    Raises:
        CheckpointError: there is no whole checkpoint, or `out` exists already.
    """
    out = Path(out)
    if out.exists():
        raise CheckpointError(f"{out}: this folder exists already; give one that does not.")
    weights = find_weights(source)
    settings = training_settings(weights)
    known = {"method": settings.method if settings else None, **evidence(weights)}
    save_export(load_encoder(weights), out, known)
    return out


def evidence(weights: Path) -> dict[str, Any]:
    """What is known of a checkpoint: its run, its file and the run's evaluations."""
    run_dir = weights.parent.parent
    known: dict[str, Any] = {"run": run_dir.name, "checkpoint": weights.name}
    for path in sorted((run_dir / "evaluations").glob("*.json")):
        probe = json.loads(path.read_text(encoding="utf-8"))["probe"]
        known[f"mean AUROC, {path.stem}"] = {kind: probe[kind]["mean"] for kind in probe}
    return known
