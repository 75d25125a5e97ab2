"""Keeps the sweep's records while Tune runs, and shows how it goes.

Nothing here raises: Tune would take it for the failure of a trial. What goes wrong stops the sweep.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import cloudpickle
from ray.tune import Callback

from mlvicx_dist.errors import DataError, last_line
from mlvicx_dist.storage import told
from mlvicx_dist.train.checkpoint import remove_checkpoints
from mlvicx_dist.train.failures import user_error
from mlvicx_dist.tune.records import (
    Look,
    Record,
    Records,
    State,
    looks_share,
)
from mlvicx_dist.tune.runner import Stop
from mlvicx_dist.tune.table import Table

METRIC, TIME = "target", "step"
MOST_LOOKING = 0.15
"""The share of a trial's time that looks may take without a word."""


class Book(Callback):
    """Writes down what Tune tells of each trial.

    Attributes:
        records: What is known of the trials.
        pruned: Numbers of the trials that a rung stopped.
        total: Steps of a trial.
    """

    def __init__(self, records: Records, table: Table, stop: Stop, *, total: int) -> None:
        self.records, self.pruned, self.total = records, set[int](), total
        self._table, self._stop = table, stop
        self._before_s, self._began_s = records.elapsed_s(), time.monotonic()
        self._leaving: Record | None = None
        self._warned = False

    def begin(self, number: int, point: dict[str, Any]) -> Record:
        """A trial starts, for the first time or again."""
        known = self.records.by_number.get(number)
        new = Record(number, point, began_s=self.clock())
        record = replace(known, state="running", ended_s=None, cause="") if known else new
        self._write(record)
        return record

    def end(self, number: int, *, died: bool) -> Record:
        """A trial ends; its state says how. One that was only interrupted is running still."""
        record = self.records.by_number[number]
        state, cause = record.state, record.cause
        if state == "running":
            state, cause = self._how(record, died)
        ended_s = None if state == "running" else self.clock()
        record = replace(record, state=state, cause=cause, ended_s=ended_s)
        self._write(record)
        return record

    def _how(self, record: Record, died: bool) -> tuple[State, str]:
        if died:
            return "failed", "its processes died"
        if record.reached >= self.total:
            return "finished", ""
        if record.number in self.pruned:
            return "pruned", ""
        if self._stop.stop_all():
            return "running", ""
        return "failed", f"it ended without a look at its last step, {self.total}"

    def clock(self) -> float:
        """Seconds of sweeping, over all starts."""
        return self._before_s + time.monotonic() - self._began_s

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A look, or why there will be none."""
        record = self.records.by_number[trial.config["number"]]
        if "cause" in result:
            record = replace(record, state=result["state"], cause=str(result["cause"]))
        if math.isfinite(result[METRIC]):
            times = {name: float(result[name]) for name in ("trained_s", "looked_s")}
            look = Look(int(result[TIME]), float(result[METRIC]), at_s=self.clock(), **times)
            record = record.seen(look)
        self._write(record)
        self._table.look(record)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Its processes died; Tune starts it again."""
        record = self.records.by_number[trial.config["number"]]
        self._write(replace(record, deaths=record.deaths + 1))
        self._table.say(f"trial {record.name} died; going on from its newest checkpoint")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Its processes died too often."""
        record = self.records.by_number[trial.config["number"]]
        record = replace(record, state="failed", cause=_cause(trial))
        self._write(record)
        self._table.end(record)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """It ended: only a trial that goes on needs checkpoints."""
        record = self.records.by_number[trial.config["number"]]
        if record.state == "running":
            return
        # Workers of a trial that a rung stopped may still write: those of the one before do not.
        if self._leaving:
            remove_checkpoints(self.records.folder / self._leaving.name)
        self._leaving = record if record.state != "failed" else None
        self._table.end(record)
        share = looks_share(self.records.all())
        if share > MOST_LOOKING and not self._warned:
            self._warned = True
            self._table.say(
                f"looks take {share:.0%} of the trials' time: a longer target.every_steps or "
                "fewer target.images would leave more for training"
            )

    def _write(self, record: Record) -> None:
        try:
            self.records.write(record)
        except OSError as error:
            self._stop.error = DataError(
                f"{self.records.folder}: what is known of trial {record.name} cannot be written "
                f"({told(error)}); free space or mend the access, then run the same command again."
            )


def _cause(trial: Any) -> str:
    """Why a trial failed for good, in a line."""
    try:
        error = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    except Exception:
        return "its processes died"
    return last_line(user_error(error) or error)[:300]
