"""Which point a trial tries, and which trials go on: Optuna and ASHA, over the sweep's records.

Both are rebuilt from the records at every start, so that a sweep whose driver died decides as if it
had not: neither keeps state of its own on a disk.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search import Searcher

from mlvicx_dist.config import Search
from mlvicx_dist.tune.book import METRIC, TIME, Book
from mlvicx_dist.tune.records import ENDED, Look, Record
from mlvicx_dist.tune.space import Space, new_study


class PointSearch(Searcher):
    """Hands out the trials by number: first those that did not end, then new ones.

    The point of a new trial is that of the grid, or of the warm start, or what Optuna's sampler
    suggests; the sampler is seeded by the sweep's seed and the trial's number.
    """

    def __init__(
        self,
        space: Space,
        search: Search,
        book: Book,
        *,
        first: Sequence[dict[str, Any]],
        given: Callable[[Record], dict[str, Any]],
    ) -> None:
        """Get ready.

        Args:
            space: Of the points.
            search: How they are found.
            book: Where trials are written down.
            first: Points of the first trials by number, such as a grid.
            given: From a trial to what Tune hands to its function.
        """
        super().__init__(metric=METRIC, mode="max")
        self._space, self._search, self._book = space, search, book
        self._first, self._given = first, given
        self._study = new_study()
        self._asked: dict[str, tuple[int, optuna.Trial]] = {}
        known = book.records.all()
        self._again = [record.number for record in known if record.state not in ENDED]
        self._next = 1 + max((record.number for record in known), default=-1)
        for record in known:
            if record.state in ENDED:
                self._study.add_trial(self._ended(record))

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """What Tune hands to the function of its next trial."""
        fixed: dict[str, Any] | None
        if self._again:
            number = self._again.pop(0)
            fixed = self._book.records.by_number[number].point
        else:
            number, self._next = self._next, self._next + 1
            fixed = self._first[number] if number < len(self._first) else None
        point, trial = self._ask(number, fixed)
        self._asked[trial_id] = number, trial
        return self._given(self._book.begin(number, point))

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Optuna hears of each look."""
        _, trial = self._asked[trial_id]
        if math.isfinite(result[METRIC]):
            with warnings.catch_warnings():
                # A step that was done again after a death is told once more.
                warnings.simplefilter("ignore")
                trial.report(result[METRIC], result[TIME])

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """The trial's end is written down, and Optuna hears how it ended."""
        number, trial = self._asked.pop(trial_id)
        ended = self._ended(self._book.end(number, died=error))
        self._study.tell(trial, ended.value, state=ended.state)

    def save(self, checkpoint_path: str) -> None:
        """Nothing to keep: the records are the memory."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing was kept."""

    def _ask(
        self, number: int, fixed: dict[str, Any] | None
    ) -> tuple[dict[str, Any], optuna.Trial]:
        seed = int.from_bytes(f"{self._search.seed}/{number}".encode(), "big") % (2**31 - 1)
        if self._search.by == "optuna":
            self._study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        else:
            self._study.sampler = optuna.samplers.RandomSampler(seed=seed)
        if fixed is not None:
            self._study.enqueue_trial(self._space.parameters(fixed))
        trial = self._study.ask()
        return self._space.suggest(trial), trial

    def _ended(self, record: Record) -> optuna.trial.FrozenTrial:
        """A record as a trial of Optuna's."""
        # One that diverged is to Optuna one that was pruned at once: the worst there is.
        states = {
            "finished": optuna.trial.TrialState.COMPLETE,
            "pruned": optuna.trial.TrialState.PRUNED,
            "diverged": optuna.trial.TrialState.PRUNED,
        }
        state = states.get(record.state, optuna.trial.TrialState.FAIL)
        looks = () if record.state == "diverged" else record.looks
        parameters = self._space.parameters(record.point)
        distributions = self._space.distributions()
        return optuna.trial.create_trial(
            state=state,
            value=record.target if state == optuna.trial.TrialState.COMPLETE else None,
            params=parameters,
            distributions={key: distributions[key] for key in parameters},
            intermediate_values={look.step: look.target for look in looks},
        )


class Rungs(AsyncHyperBandScheduler):
    """ASHA that knows the looks of earlier starts, and lets who passed the last rung save in peace.

    All trials follow the learning-rate schedule of the whole run: at a rung each is at the same
    point of it, so that they are compared alike; a schedule of its own for each rung would have to
    be undone for those that go on.
    """

    def __init__(self, book: Book, *, total: int, grace_steps: int, reduction: float) -> None:
        super().__init__(
            time_attr=TIME,
            metric=METRIC,
            mode="max",
            max_t=total,
            grace_period=grace_steps,
            reduction_factor=reduction,
            stop_last_trials=False,
        )
        self._book = book
        for record in book.records.all():
            if record.state in ENDED:
                stand_in = SimpleNamespace(trial_id=record.name)
                super().on_trial_add(None, stand_in)
                self._hear(stand_in, record.looks)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """A trial that goes on brings its looks along."""
        super().on_trial_add(tune_controller, trial)
        self._hear(trial, self._book.records.by_number[trial.config["number"]].looks)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Whether a trial goes on; one that does not is written down as pruned."""
        decision: str = super().on_trial_result(tune_controller, trial, result)
        if result[TIME] >= self._book.total:
            # It ends by itself, once its encoder is saved.
            return str(self.CONTINUE)
        if decision == self.STOP:
            self._book.pruned.add(trial.config["number"])
        return decision

    def _hear(self, trial: Any, looks: Sequence[Look]) -> None:
        for look in looks:
            super().on_trial_result(None, trial, {TIME: look.step, METRIC: look.target})
