"""Trials on a cluster: how many at once, and Tune as we call it."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import tune
from ray.tune.stopper import Stopper

from mlvicx_dist.capacity import slots
from mlvicx_dist.errors import ResourceError, TrainingError, UserError, last_line
from mlvicx_dist.session import scratch
from mlvicx_dist.train.group import each, where_logs_are
from mlvicx_dist.train.memory import PROCESS_BYTES, needed_bytes
from mlvicx_dist.tune.plan import Plan
from mlvicx_dist.tune.trial import run_trial

HEAD = "node:__internal_head__"
"""A resource that the head node of every cluster has."""
DRIVER_BYTES = 2_200_000_000
"""Memory of the head node for a trial's own processes: Tune's, and Train's controller."""


@dataclass
class Stop(Stopper):
    """Why a whole sweep is to stop; Tune asks it again and again.

    Attributes:
        asked: Signals that came.
        error: What went wrong in the sweep's own process.
    """

    asked: list[int]
    error: UserError | None = field(default=None)

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether a trial is to stop by itself: never."""
        return False

    def stop_all(self) -> bool:
        """Whether all trials are."""
        return bool(self.asked) or self.error is not None


def concurrency(plan: Plan) -> int:
    """How many trials run at once in the cluster that this process is connected to.

    What an autoscaler would add is not always known: `trials.concurrent` is then the user's word.

    Raises:
        ResourceError: not even one finds room, node by node, and the user gave no such word.
    """
    config, workers = plan.config, plan.config.pretrain.workers
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    one = each(workers)
    if not workers.use_gpu:
        rows = math.ceil(config.pretrain.train.batch_size / workers.num)
        one["memory"] = PROCESS_BYTES + needed_bytes(plan.largest, rows)
        if len(alive) == 1:
            one["memory"] += DRIVER_BYTES / workers.num
    fit = slots(one) // workers.num
    if config.trials.concurrent:
        return config.trials.concurrent if not fit else min(config.trials.concurrent, fit)
    if not fit:
        asked = " and ".join(
            f"{amount / 1e9:.1f} GB" if kind == "memory" else f"{amount:g} {kind}"
            for kind, amount in one.items()
        )
        raise ResourceError(
            f"a trial needs {workers.num} workers of {asked} each, but the nodes have room for "
            f"{slots(one)} such workers, whatever else runs; lower pretrain.workers.num, "
            "pretrain.workers.cpus_per_worker or pretrain.train.batch_size, use larger nodes, or "
            "say with trials.concurrent how many trials a cluster that grows will hold."
        )
    head: dict[str, float] = next((there for there in alive if HEAD in there), {})
    return min(fit, max(int(head.get("memory", DRIVER_BYTES) // DRIVER_BYTES), 1))


def run_tune(
    given: Any,
    *,
    stop: Stop,
    samples: int,
    at_once: int,
    max_failures: int,
    search: Any = None,
    scheduler: Any = None,
    callbacks: Any = (),
) -> Any:
    """Run trials under Tune; what comes of them is for the callbacks and the search.

    Args:
        given: What each trial's function is given, where there is no search.
        stop: Ends all of them.
        samples: How many trials, where there is a search.
        at_once: How many run at a time.
        max_failures: How often one whose processes died is started again.
        search: Suggests what trials are given.
        scheduler: Stops trials.
        callbacks: Hear of them.

    Returns:
        Tune's results.

    Raises:
        UserError: what `stop` was told, or that Tune itself could not go on.
    """
    os.environ |= {
        # The records are the memory: what Tune keeps of its own is for this start alone.
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        # Only Tune's older output can be silenced; `table` shows the trials.
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
        # Signals are `stop`'s.
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
    }
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    # Tune's process of a trial holds no core, and lies where no spot node takes it along.
    place_of_driver = tune.PlacementGroupFactory([{HEAD: 0.001}])
    try:
        with scratch("sweep") as folder:
            results = tune.Tuner(
                tune.with_resources(run_trial, place_of_driver),
                param_space=given,
                tune_config=tune.TuneConfig(
                    num_samples=samples,
                    max_concurrent_trials=at_once,
                    search_alg=search,
                    scheduler=scheduler,
                    trial_name_creator=str,
                    trial_dirname_creator=lambda trial: str(trial.trial_id),
                ),
                run_config=tune.RunConfig(
                    name="tune",
                    storage_path=folder,
                    failure_config=tune.FailureConfig(max_failures=max_failures),
                    callbacks=list(callbacks),
                    stop=stop,
                    verbose=0,
                ),
            ).fit()
    except Exception as error:
        if stop.error:
            raise stop.error from None
        raise TrainingError(
            f"Ray Tune could not go on ({last_line(error)}); "
            f"{where_logs_are()}, and the same command goes on without losing an ended trial."
        ) from error
    if stop.error:
        raise stop.error
    return results
