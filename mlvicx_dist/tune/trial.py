"""What Tune runs for a trial: `pretrain`, as the command does, with what it finds handed to Tune.

Tune's process holds no core: the workers of Ray Train beside it do, and they are placed together or
not at all, so that no trial can keep another from its workers.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from ray import tune

from mlvicx_dist.config import PretrainConfig, Target, parse_config
from mlvicx_dist.errors import DivergenceError, UserError
from mlvicx_dist.storage import place
from mlvicx_dist.train.launch import pretrain
from mlvicx_dist.train.owner import once_free
from mlvicx_dist.train.runlog import read_rows
from mlvicx_dist.tune.target import judged_by

GOODBYE_S = 60.0
"""How long a process of this trial that was just killed may still hold its run."""


def run_trial(given: dict[str, Any]) -> None:
    """Train one trial to its end, going on from its newest checkpoint.

    What the user must mend is reported and not raised: Tune would only try it again.

    Args:
        given: `settings`, and `target` or None, as trees.
    """
    judge = judged_by(Target.model_validate(given["target"])) if given["target"] else None
    run = given["settings"]["run"]
    step = looked = 0

    def heard(row: dict[str, Any]) -> None:
        nonlocal step, looked
        step = max(step, int(row.get("step", 0)))
        if "target" in row:
            looked = step
            tune.report(look_of(row))
        elif judge and step > looked and "world_size" in row:
            tell_again(step)

    def tell_again(until: int) -> None:
        """Looks of an earlier start, which may have ended before it could say so."""
        nonlocal looked
        for row in read_rows(place(run["storage_path"]) / run["name"] / "metrics.jsonl"):
            if "target" in row and looked < row["step"] <= until:
                looked = int(row["step"])
                tune.report(look_of(row))

    try:
        config = parse_config(given["settings"], "the trial's settings")
        assert isinstance(config, PretrainConfig)
        outcome = once_free(partial(pretrain, config, judge=judge, heard=heard), GOODBYE_S)
    except UserError as error:
        state = "diverged" if isinstance(error, DivergenceError) else "failed"
        tune.report({"step": step, "target": math.nan, "state": state, "cause": str(error)})
        return
    if judge is None:
        tune.report({"step": outcome.steps, "target": math.nan})
    else:
        tell_again(outcome.steps)


def look_of(row: dict[str, Any]) -> dict[str, float]:
    """What Tune is told of a log row with a target."""
    return {
        "step": row["step"],
        "target": row["target"],
        "trained_s": row["target/trained_s"],
        "looked_s": row["target/looked_s"],
    }
