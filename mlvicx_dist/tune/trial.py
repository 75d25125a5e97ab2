"""What Tune runs for a trial: `pretrain`, as the command does, with what it finds handed to Tune.

Tune's process holds no core: the workers of Ray Train beside it do, and they are placed together or
not at all, so that no trial can keep another from its workers.
"""

from __future__ import annotations

import math
import time
from typing import Any

from ray import tune

from mlvicx_dist.config import Target
from mlvicx_dist.errors import DivergenceError, UserError
from mlvicx_dist.storage import place
from mlvicx_dist.train.launch import pretrain
from mlvicx_dist.train.owner import TakenError
from mlvicx_dist.train.runlog import read_rows
from mlvicx_dist.tune.target import judged_by, settings_of

GOODBYE_S = 60.0
"""How long a process of this trial that was just killed may still hold its run."""


def run_trial(given: dict[str, Any]) -> None:
    """Train one trial to its end, going on from its newest checkpoint.

    What the user must mend is reported and not raised: Tune would only try it again.

    Args:
        given: `settings`, and `target` or None, as trees.
    """
    config = settings_of(given["settings"])
    judge = judged_by(Target.model_validate(given["target"])) if given["target"] else None
    step = 0

    def heard(row: dict[str, Any]) -> None:
        nonlocal step
        step = max(step, int(row.get("step", 0)))
        if "target" in row:
            tune.report(look_of(row))

    until_s = time.monotonic() + GOODBYE_S
    try:
        while True:
            try:
                outcome = pretrain(config, judge=judge, heard=heard)
                break
            except TakenError:
                if time.monotonic() > until_s:
                    raise
                time.sleep(1.0)
    except UserError as error:
        kind = "diverged" if isinstance(error, DivergenceError) else "failed"
        tune.report({"step": step, "target": math.nan, kind: str(error)})
        return
    if outcome.already_finished or judge is None:
        rows = read_rows(place(outcome.run_dir) / "metrics.jsonl") if judge else []
        looks = [look_of(row) for row in rows if "target" in row]
        for look in looks or [{"step": outcome.steps, "target": math.nan}]:
            tune.report(look)


def look_of(row: dict[str, Any]) -> dict[str, float]:
    """What Tune is told of a log row with a target."""
    return {
        "step": row["step"],
        "target": row["target"],
        "trained_s": row["target/trained_s"],
        "looked_s": row["target/looked_s"],
    }
