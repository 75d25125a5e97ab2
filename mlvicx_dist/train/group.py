"""A group of workers in Ray: the cluster with room for it, Ray Train's trainer, and its end.

Pretraining, fine-tuning and `mlvicx profile` run their workers so; what each asks for is here too.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlvicx_dist.capacity import check_resources, this_machine
from mlvicx_dist.config import Workers
from mlvicx_dist.errors import TrainingError, last_line
from mlvicx_dist.session import on_cluster, ray_session
from mlvicx_dist.train.allocator import FROM_THE_START
from mlvicx_dist.train.shown import Row, Silence

POLL_S = 0.2
PREEMPTION_POLL_S = 2
HEALTH_CHECK_S = 1
STUCK_WORKER_S = 5
ELASTIC_START_S = 12.0
ASKED = "workers.num x workers.cpus_per_worker"
REMEDY = "lower workers.num or workers.cpus_per_worker"


def each(workers: Workers) -> dict[str, float]:
    """What one worker takes of a node."""
    return {"CPU": float(workers.cpus_per_worker), **({"GPU": 1.0} if workers.use_gpu else {})}


def least(workers: Workers) -> dict[str, float]:
    """What the smallest group takes."""
    count = workers.min or workers.num
    return {kind: count * amount for kind, amount in each(workers).items()}


def check_room(workers: Workers) -> None:
    """See that the machine or the cluster has room for the smallest group, before other work.

    Raises:
        ResourceError: it has not, or no cluster answers.
    """
    if not on_cluster():
        check_resources(least(workers), this_machine(), "this machine", ASKED, REMEDY)
        return
    with cluster(workers):
        pass


@contextmanager
def cluster(workers: Workers) -> Iterator[None]:
    """Ray with room for the least number of workers."""
    # An elastic group asks only for what is there. Ray may still count a node that is just gone:
    # then the next try, soon, is the right one.
    start_s = min(workers.start_timeout_s, ELASTIC_START_S if workers.min else float("inf"))
    for name, value in {
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": start_s,
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": workers.collective_timeout_s,
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": workers.collective_timeout_s,
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": HEALTH_CHECK_S,
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": PREEMPTION_POLL_S,
        # What a worker that stands still is given before it is killed. Ray hands it to a private
        # cluster's processes; on another cluster it is Ray's own 30 s.
        "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": STUCK_WORKER_S,
    }.items():
        os.environ[name] = str(value)
    with ray_session(least(workers), asked=ASKED, remedy=REMEDY, deaf=True):
        logging.getLogger("ray.train").setLevel(logging.ERROR)
        yield


def trainer(
    function: Callable[[dict[str, Any]], Any],
    plan: dict[str, Any],
    workers: Workers,
    channel: Path,
    folder: str,
    *,
    guard: Any = None,
    resumes: bool = True,
) -> Any:
    """Ray's trainer of a group as the settings want it.

    Args:
        function: What each worker runs.
        plan: Its argument, to which `guard` is added.
        workers: The group.
        channel: Where rank 0's rows go, see `watching`.
        folder: For what Ray stores of its own.
        guard: The run's; None: one without a name.
        resumes: Whether a new group goes on from a checkpoint; else it begins anew.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from mlvicx_dist.train.failures import Failures
    from mlvicx_dist.train.guard import unnamed_guard

    return TorchTrainer(
        function,
        train_loop_config={**plan, "guard": guard or unnamed_guard(channel)},
        scaling_config=ScalingConfig(
            num_workers=(workers.min, workers.num) if workers.min else workers.num,
            use_gpu=workers.use_gpu,
            resources_per_worker=each(workers),
            # Ray would end a group without a checkpoint to make it larger: see `_Growth`.
            elastic_resize_monitor_interval_s=float("inf"),
        ),
        # What Ray stores of its own is the controller's, and that runs on this node. The failures
        # are counted in `Failures`: a run of weeks may see many, as long as it gets on.
        run_config=RunConfig(
            name="ray",
            storage_path=folder,
            failure_config=FailureConfig(max_failures=-1, controller_failure_limit=-1),
            callbacks=[Failures(channel, workers.max_failures, resumes=resumes)],
            worker_runtime_env={} if workers.use_gpu else {"env_vars": FROM_THE_START},
        ),
        torch_config=TorchConfig(timeout_s=int(workers.collective_timeout_s)),
    )


class Fit(threading.Thread):
    """Ray's fit, and what came of it."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(name="mlvicx-fit", daemon=True)
        self._trainer = trainer
        self._found: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """Fit, in this thread."""
        try:
            self._found = self._trainer.fit().return_value
        except BaseException as error:
            self._error = error

    def result(self, given_up: Callable[[str], str]) -> Any:
        """What rank 0 returned.

        Args:
            given_up: The sentence for the reason that Ray gives.

        Raises:
            UserError: what a worker raised, or that Ray gave up.
        """
        from ray.train import TrainingFailedError

        from mlvicx_dist.train.failures import user_error

        if self._error is None:
            return self._found
        cause = user_error(self._error)
        if cause:
            raise cause from None
        if isinstance(self._error, TrainingFailedError):
            raise TrainingError(given_up(last_line(self._error))) from self._error
        raise self._error


def fitted(
    trainer: Any, failed: str, *, channel: Path, show: Callable[[Row], None], wait_s: float
) -> dict[str, Any]:
    """What rank 0 found, of a group that is run to its end.

    Args:
        trainer: Of the group, see `trainer`.
        failed: The beginning of the sentence where it cannot be.
        channel: Where the rows come from.
        show: Called, in another thread, with each row.
        wait_s: `workers.wait_s`.

    Raises:
        UserError: what a worker raised, `failed` and the reason, or that nothing was heard of the
            workers for `wait_s`.
    """
    from mlvicx_dist.train.rows import watching

    fit, silence = Fit(trainer), Silence()

    def hear(row: Row) -> None:
        silence.hear(row)
        show(row)

    with watching(channel, hear):
        fit.start()
        while fit.is_alive():
            silence.check(wait_s, failed, "run the same command again.")
            fit.join(POLL_S)
    return dict(fit.result(lambda reason: f"{failed} ({reason})."))


def where_logs_are() -> str:
    """Where Ray's logs of this session lie, in words."""
    import ray

    node = ray._private.worker._global_node
    return f"the workers' logs are in {node.get_session_dir_path()}/logs" if node else "see the log"
