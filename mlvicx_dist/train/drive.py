"""The driver's side of a run: the group, what is shown of it, and the signals that stop it.

Ray's own `fit` runs in a thread, so that this one hears SIGTERM and Ctrl-C: the first asks the
workers to save and end after their step, a second Ctrl-C ends at once.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlvicx_dist.capacity import room_for
from mlvicx_dist.config import PretrainConfig, to_tree
from mlvicx_dist.progress import progress
from mlvicx_dist.session import on_cluster, scratch
from mlvicx_dist.stopping import signals
from mlvicx_dist.storage import Place, reaching
from mlvicx_dist.train.group import POLL_S, Fit, cluster, each, trainer, where_logs_are
from mlvicx_dist.train.owner import TOKEN
from mlvicx_dist.train.shown import Refusals, Row, Shown
from mlvicx_dist.train.worker import train_worker

IDLE_S = 5.0
"""After a signal: how long to wait for word of a group that may just have begun."""
LOOK_S = 2.0
"""How often the driver looks for room for more workers."""

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
        from mlvicx_dist.train.rows import watching

        channel = Path(folder) / "rows.jsonl"
        held = guard(str(run_dir), channel=channel)
        token = uuid.uuid4().hex
        begin(token)
        plan = {
            "settings": to_tree(config),
            "run_dir": str(run_dir),
            "token": token,
            "check_memory": elsewhere,
            "judge": judge,
        }
        fit = Fit(trainer(train_worker, plan, config.workers, channel, folder, guard=held))
        try:
            with progress("training", total, "steps") as bar, signals() as asked:
                shown = Shown(bar, heard)
                growth, refusals = _Growth(config), Refusals(bar)
                told, until_s = False, math.inf
                with watching(channel, shown):
                    fit.start()
                    while fit.is_alive() and (shown.world_size or time.monotonic() < until_s):
                        fit.join(POLL_S)
                        if asked and not told:
                            held.tell.remote(int(Notice.STOP))
                            bar.say("stopping after a checkpoint; Ctrl-C again stops at once")
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


def _given_up(reason: str) -> str:
    return (
        f"Ray could not go on with the run ({reason}); {where_logs_are()}, and the same command "
        "goes on from the newest checkpoint."
    )


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
