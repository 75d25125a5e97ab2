"""The driver's side of a run: Ray, the trainer, what is shown, and the signals that stop it.

Ray's own `fit` runs in a thread, so that this one hears SIGTERM and Ctrl-C: the first asks the
workers to save and end after their step, a second Ctrl-C ends at once.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from mlvicx_dist.config import PretrainConfig, Workers, to_tree
from mlvicx_dist.errors import ResourceError, TrainingError
from mlvicx_dist.progress import Progress, duration, progress
from mlvicx_dist.session import (
    check_resources,
    on_cluster,
    ray_session,
    refused_launches,
    room_for,
    scratch,
    this_machine,
)
from mlvicx_dist.storage import Place, reaching
from mlvicx_dist.train.owner import TOKEN
from mlvicx_dist.train.worker import train_worker

POLL_S = 0.2
PREEMPTION_POLL_S = 2
HEALTH_CHECK_S = 1
GOODBYE_S = 5
ELASTIC_START_S = 12.0
IDLE_S = 5.0
"""After a signal: how long to wait for word of a group that may just have begun."""
REFUSALS_S = 20.0
"""How often the autoscaler is asked what it was refused, while workers are waited for."""
LOOK_S = 2.0
"""How often the driver looks for room for more workers."""
ASKED = "workers.num x workers.cpus_per_worker"
REMEDY = "lower workers.num or workers.cpus_per_worker"

Row = dict[str, Any]
MakeJudge = Callable[[PretrainConfig, Any], Any]
"""From the settings and the `step.Member` to a `loop.Judge`; a function of a module, or partial."""


@dataclass(frozen=True)
class Driven:
    """How far a run came: steps done, the step that it went on from, the signal that stopped it."""

    steps: int
    resumed_from: int
    stopped_by: int


def drive(
    config: PretrainConfig,
    run_dir: Place,
    total: int,
    *,
    begin: Callable[[str], None],
    judge: MakeJudge | None = None,
    heard: Callable[[Row], None] = lambda row: None,
) -> Driven:
    """Train on Ray until the end or a signal, showing progress.

    Args:
        config: The settings.
        run_dir: The run's folder.
        total: Steps of the whole run.
        begin: Called with the driver's token, as soon as this is the one driver in the cluster.
        judge: Called in each worker; what it makes judges the encoder at some steps.
        heard: Called, in another thread, with each row of rank 0.

    Raises:
        UserError: what a worker raised, or that workers died again and again.
    """
    elsewhere = on_cluster()
    with cluster(config.workers), scratch("run") as folder:
        from mlvicx_dist.train.guard import guard
        from mlvicx_dist.train.notices import Notice
        from mlvicx_dist.train.watch import watching

        held = guard(str(run_dir))
        token = uuid.uuid4().hex
        begin(token)
        channel = Path(folder) / "rows.jsonl"
        plan = {
            "settings": to_tree(config),
            "run_dir": str(run_dir),
            "token": token,
            "guard": held,
            "check_memory": elsewhere,
            "judge": judge,
        }
        fit = _Fit(trainer(train_worker, plan, config.workers, channel, folder))
        try:
            with progress("training", total, "steps") as bar, signals() as asked:
                shown = _Shown(bar, heard)
                growth, refusals = _Growth(config), _Refusals(bar)
                told, until_s = False, math.inf
                with watching(channel, shown):
                    fit.start()
                    while fit.is_alive() and (shown.world_size or time.monotonic() < until_s):
                        fit.join(POLL_S)
                        if asked and not told:
                            bar.say("stopping after a checkpoint; Ctrl-C again stops at once")
                            held.tell.remote(int(Notice.STOP))
                            told, until_s = True, time.monotonic() + IDLE_S
                        elif not told and growth.wanted(shown.world_size):
                            held.tell.remote(int(Notice.REGROUP))
                        shown.check_silence(config.workers.wait_s)
                        if elsewhere and not shown.world_size:
                            refusals.tell()
                # Where no worker was at work there is nothing to save.
                steps = 0 if fit.is_alive() else int(fit.result(_given_up))
        finally:
            with suppress(OSError), reaching(run_dir):
                (run_dir / TOKEN.format(token)).unlink()
    return Driven(steps, shown.resumed, asked[0] if asked and steps < total else 0)


class _Fit(threading.Thread):
    """Ray's fit, and what came of it."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(name="mlvicx-fit", daemon=True)
        self._trainer = trainer
        self._found: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
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

        from mlvicx_dist.train.watch import user_error

        if self._error is None:
            return self._found
        cause = user_error(self._error)
        if cause:
            raise cause from None
        if isinstance(self._error, TrainingFailedError):
            words = str(self._error).strip().splitlines()
            reason = words[-1] if words else "no message"
            raise TrainingError(given_up(reason)) from self._error
        raise self._error


def _given_up(reason: str) -> str:
    return (
        f"Ray could not go on with the run ({reason}); {where_logs_are()}, and the same command "
        "goes on from the newest checkpoint."
    )


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
    from mlvicx_dist.train.watch import watching

    fit, silence = _Fit(trainer), _Silence()

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


def trainer(
    function: Callable[[dict[str, Any]], Any],
    plan: dict[str, Any],
    workers: Workers,
    channel: Path,
    folder: str,
    *,
    resumes: bool = True,
) -> Any:
    """Ray's trainer of a group as the settings want it.

    Args:
        function: What each worker runs.
        plan: Its argument.
        workers: The group.
        channel: Where rank 0's rows go, see `watching`.
        folder: For what Ray stores of its own.
        resumes: Whether a new group goes on from a checkpoint; else it begins anew.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from mlvicx_dist.train.watch import Forward

    return TorchTrainer(
        function,
        train_loop_config=plan,
        scaling_config=ScalingConfig(
            num_workers=(workers.min, workers.num) if workers.min else workers.num,
            use_gpu=workers.use_gpu,
            resources_per_worker=each(workers),
            # Ray would end a group without a checkpoint to make it larger: see `_Growth`.
            elastic_resize_monitor_interval_s=float("inf"),
        ),
        # What Ray stores of its own is the controller's, and that runs on this node. The failures
        # are counted in `Forward`: a run of weeks may see many, as long as it gets on.
        run_config=RunConfig(
            name="ray",
            storage_path=folder,
            failure_config=FailureConfig(max_failures=-1, controller_failure_limit=-1),
            callbacks=[Forward(channel, workers.max_failures, resumes=resumes)],
        ),
        torch_config=TorchConfig(timeout_s=int(workers.collective_timeout_s)),
    )


def each(workers: Workers) -> dict[str, float]:
    """What one worker takes of a node."""
    return {"CPU": float(workers.cpus_per_worker), **({"GPU": 1.0} if workers.use_gpu else {})}


class _Growth:
    """When a group that is smaller than it may be should make way for a larger one."""

    def __init__(self, config: PretrainConfig) -> None:
        self._workers = config.workers
        self._looked_s = self._since_s = time.monotonic()
        self._after_s = config.workers.resize_after_s

    def wanted(self, world_size: int) -> bool:
        """Whether there was room for more workers all along for the time that is asked."""
        now = time.monotonic()
        if not self._workers.min or not 0 < world_size < self._workers.num:
            self._since_s = now
            return False
        if now - self._looked_s < LOOK_S:
            return False
        self._looked_s = now
        if not room_for(each(self._workers)):
            self._since_s, self._after_s = now, self._workers.resize_after_s
        if now - self._since_s < self._after_s:
            return False
        # If the next group is no larger, what seemed room was none: wait longer each time.
        self._since_s, self._after_s = now, 2 * self._after_s
        return True


class _Refusals:
    """Says, once each, which machines the autoscaler was refused while workers are waited for."""

    def __init__(self, bar: Progress) -> None:
        self._bar, self._told = bar, set[str]()
        self._look_s = time.monotonic() + REFUSALS_S

    def tell(self) -> None:
        """Ask now and then."""
        if time.monotonic() < self._look_s:
            return
        self._look_s = time.monotonic() + REFUSALS_S
        for words in refused_launches():
            if words not in self._told:
                self._told.add(words)
                self._bar.say(f"the autoscaler was refused {words}")


@contextmanager
def signals() -> Iterator[list[int]]:
    """The first SIGTERM or SIGINT that comes while the block runs, in a list."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def handle(number: int, frame: Any) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Shown:
    """Rows of the workers as progress on the driver.

    Attributes:
        started: Whether any group has begun.
        resumed: The step that the first one went on from.
        world_size: Workers of the group that is at work; 0 where there is none.
    """

    def __init__(self, bar: Progress, heard: Callable[[Row], None]) -> None:
        self._bar, self._heard, self._step = bar, heard, 0
        self.started, self.resumed, self.world_size = False, 0, 0
        self._silence = _Silence()

    def __call__(self, row: Row) -> None:
        self._show(row)
        self._heard(row)

    def _show(self, row: Row) -> None:
        for words in row.get("said", ()):
            self._bar.say(words)
        if "step" not in row:
            self.world_size = 0
            return
        self._silence.hear(row)
        step = int(row["step"])
        if "loss" not in row:
            if not self.started:
                self.started, self._step, self.resumed = True, step, step
                self._bar.skip(step)
            self.world_size = int(row["world_size"])
            more = "s" if self.world_size > 1 else ""
            nodes = placed(row.get("nodes", ()))
            self._bar.say(f"{self.world_size} worker{more} from step {step}{nodes}")
            return
        terms = ", ".join(
            f"{name} {row[name]:.3g}" for name in row if name.endswith("_weighted")
        ).replace("_weighted", "")
        terms = f" ({terms})" if terms else ""
        self._bar.advance(
            max(step - self._step, 0),
            f"{row['images_per_s']:.0f} images/s, data wait {row['data_wait']:.0%}, "
            f"loss {row['loss']:.4g}{terms}",
        )
        self._step = max(step, self._step)

    def check_silence(self, limit_s: float) -> None:
        """End a wait for workers that is longer than a user wants.

        Raises:
            ResourceError: nothing was heard of any worker for `limit_s`.
        """
        remedy = "the same command goes on from the newest checkpoint."
        self._silence.check(limit_s, f"step {self._step}", remedy)


class _Silence:
    """How long nothing was heard of the workers; that some of them died is no word of theirs."""

    def __init__(self) -> None:
        self._heard_s = time.monotonic()

    def hear(self, row: Row) -> None:
        """Take a row."""
        if "step" in row:
            self._heard_s = time.monotonic()

    def check(self, limit_s: float, where: str, remedy: str) -> None:
        """End a wait that is longer than a user wants.

        Raises:
            ResourceError: nothing was heard for `limit_s`.
        """
        if time.monotonic() - self._heard_s > limit_s:
            raise ResourceError(
                f"{where}: nothing was heard of the workers for {duration(limit_s)}; see with "
                "'ray status' whether the cluster has room for them, or raise workers.wait_s; "
                f"{remedy}"
            )


def placed(nodes: Sequence[str]) -> str:
    """Which ranks are on which of several nodes, in words that follow others."""
    if len(set(nodes)) < 2:
        return ""
    told, rank = [], 0
    for node, ranks in groupby(nodes):
        last = rank + len(list(ranks)) - 1
        told.append(f"{rank} on {node}" if last == rank else f"{rank} to {last} on {node}")
        rank = last + 1
    return f" (rank {', '.join(told)})"


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
        # What a worker that stands still is given before it is killed.
        "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": GOODBYE_S,
    }.items():
        os.environ[name] = str(value)
    with ray_session(least(workers), asked=ASKED, remedy=REMEDY, deaf=True):
        logging.getLogger("ray.train").setLevel(logging.ERROR)
        yield
