"""Keeps the sweep's records while Tune runs, and shows how it goes."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

from ray.tune import Callback

from mlvicx_dist.errors import DataError
from mlvicx_dist.storage import told
from mlvicx_dist.train.watch import user_error
from mlvicx_dist.tune.records import Look, Record, Records, State, best, remove_checkpoints
from mlvicx_dist.tune.table import Table

METRIC, TIME = "target", "step"


class Book(Callback):
    """Writes down what Tune tells of each trial.

    Attributes:
        records: What is known of the trials.
        pruned: Numbers of the trials that a rung stopped.
    """

    def __init__(self, records: Records, table: Table, *, total: int) -> None:
        self.records, self.pruned = records, set[int]()
        self._table, self._total = table, total
        self._before_s, self._began_s = records.elapsed_s(), time.monotonic()

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
        state: State = "running"
        if record.state in ("diverged", "failed"):
            state = record.state
        elif died:
            state = "failed"
        elif record.looks and record.looks[-1].step >= self._total:
            state = "finished"
        elif number in self.pruned:
            state = "pruned"
        ended_s = None if state == "running" else self.clock()
        record = replace(record, state=state, ended_s=ended_s)
        self._write(record)
        return record

    def clock(self) -> float:
        """Seconds of sweeping, over all starts."""
        return self._before_s + time.monotonic() - self._began_s

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A look, or why there will be none."""
        record = self.records.by_number[trial.config["number"]]
        for state in ("diverged", "failed"):
            if state in result:
                record = replace(record, state=state, cause=str(result[state]))
        if math.isfinite(result[METRIC]):
            times = {name: float(result[name]) for name in ("trained_s", "looked_s")}
            look = Look(int(result[TIME]), float(result[METRIC]), at_s=self.clock(), **times)
            record = record.seen(look)
        self._write(record)
        self._table.look(record, best(self.records.all()))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Its processes died; Tune starts it again."""
        record = self.records.by_number[trial.config["number"]]
        self._write(replace(record, deaths=record.deaths + 1))
        self._table.say(f"trial {record.name} died; going on from its newest checkpoint")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Its processes died too often."""
        record = self.records.by_number[trial.config["number"]]
        error = trial.get_error()
        words = str(user_error(error) or error or "its processes died").strip().splitlines()
        record = replace(record, state="failed", cause=words[-1][:300])
        self._write(record)
        self._table.end(record)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """It ended: only a trial that goes on needs checkpoints."""
        record = self.records.by_number[trial.config["number"]]
        if record.state != "running":
            remove_checkpoints(self.records.folder / record.name)
            self._table.end(record)

    def _write(self, record: Record) -> None:
        try:
            self.records.write(record)
        except OSError as error:
            raise DataError(
                f"{self.records.folder}: what is known of trial {record.name} cannot be written "
                f"({told(error)}); free space or mend the access, then run the same command again."
            ) from None
