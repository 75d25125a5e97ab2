"""Trials on a cluster: how many at once, and Tune as we call it."""

from __future__ import annotations

import math
import os
from typing import Any

import ray
from ray import tune

from mlvicx_dist.config import SweepConfig
from mlvicx_dist.errors import ResourceError
from mlvicx_dist.session import scratch, slots
from mlvicx_dist.train.drive import each
from mlvicx_dist.train.memory import PROCESS_BYTES, needed_bytes
from mlvicx_dist.tune.trial import run_trial

HEAD = "node:__internal_head__"
"""A resource that the head node of every cluster has."""
DRIVER_BYTES = 2_000_000_000
"""Memory of the head node for a trial's own processes: Tune's, and Train's controller."""


def concurrency(config: SweepConfig) -> int:
    """How many trials run at once in the cluster that this process is connected to.

    Raises:
        ResourceError: not even one finds room, node by node.
    """
    workers = config.pretrain.workers
    one = each(workers)
    if not workers.use_gpu:
        rows = math.ceil(config.pretrain.train.batch_size / workers.num)
        one["memory"] = PROCESS_BYTES + needed_bytes(config.pretrain, rows)
    fit = slots(one)
    if fit < workers.num:
        asked = " and ".join(
            f"{amount / 1e9:.1f} GB" if kind == "memory" else f"{amount:g} {kind}"
            for kind, amount in one.items()
        )
        raise ResourceError(
            f"a trial needs {workers.num} workers of {asked} each, but the nodes have room for "
            f"{fit} such workers, whatever else runs; lower pretrain.workers.num, "
            "pretrain.workers.cpus_per_worker or pretrain.train.batch_size, or use larger nodes."
        )
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    head: dict[str, float] = next((there for there in alive if HEAD in there), {})
    drivers = max(int(head.get("memory", DRIVER_BYTES) // DRIVER_BYTES), 1)
    return min(fit // workers.num, drivers, config.trials.concurrent or fit)


def run_tune(
    given: Any,
    *,
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
        samples: How many trials, where there is a search.
        at_once: How many run at a time.
        max_failures: How often one whose processes died is started again.
        search: Suggests what trials are given.
        scheduler: Stops trials.
        callbacks: Hear of them.

    Returns:
        Tune's results.
    """
    # The records are the memory: what Tune keeps of its own is for this start alone.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    # Only Tune's older output can be silenced; `table` shows the trials.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    with scratch("sweep") as folder:
        # Tune's process of a trial holds no core, and lies where no spot node takes it along.
        place_of_driver = tune.PlacementGroupFactory([{HEAD: 0.001}])
        return tune.Tuner(
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
                verbose=0,
            ),
        ).fit()
