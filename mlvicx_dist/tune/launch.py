"""A sweep from its settings to its best configuration, in the order in which things happen.

The trials run under Tune and are written down by `book`; then the best configuration and the
unchanged one are trained anew by `confirm`. The same command goes on from whatever was reached.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import ray
import yaml

from mlvicx_dist.config import SweepConfig, to_tree
from mlvicx_dist.errors import TrainingError
from mlvicx_dist.session import ray_session
from mlvicx_dist.stopping import signals
from mlvicx_dist.storage import Place, make_folder, write_whole
from mlvicx_dist.train.checkpoint import remove_checkpoints
from mlvicx_dist.train.fingerprint import accept_fingerprint, check_fingerprint
from mlvicx_dist.train.group import each
from mlvicx_dist.train.guard import guard
from mlvicx_dist.train.launch import writing
from mlvicx_dist.train.owner import once_free, only_driver
from mlvicx_dist.tune.book import Book
from mlvicx_dist.tune.confirm import Confirmed, confirm
from mlvicx_dist.tune.plan import Plan, make_plan
from mlvicx_dist.tune.records import (
    ENDED,
    Record,
    Records,
    best,
    looks_share,
)
from mlvicx_dist.tune.runner import Stop, concurrency, run_tune
from mlvicx_dist.tune.search import PointSearch, Rungs
from mlvicx_dist.tune.space import described
from mlvicx_dist.tune.table import shown

GOODBYE_S = 30.0
"""How long a driver that was just killed may still hold its sweep in a cluster."""
SWEEP = ("sweep", "name")
"""What is refused, in the words of a sweep's settings."""


@dataclass(frozen=True)
class Outcome:
    """What `sweep` did.

    Attributes:
        folder: The sweep's folder.
        records: Of all trials.
        best: The best of them, where one ran to its end.
        confirmed: The best configuration against the unchanged one.
        stopped_by: The signal that stopped it before its end, or 0.
    """

    folder: Place
    records: list[Record]
    best: Record | None = None
    confirmed: Confirmed | None = None
    stopped_by: int = 0

    def document(self) -> dict[str, Any]:
        """For machines."""
        return {
            "sweep": str(self.folder),
            "trials": len(self.records),
            **{state: count for state, count in sorted(self._counts().items())},
            "best": asdict(self.best) if self.best else None,
            "looks_share": looks_share(self.records),
            "confirmed": asdict(self.confirmed) if self.confirmed else None,
            "stopped": bool(self.stopped_by),
        }

    def lines(self) -> list[str]:
        """For people."""
        counts = ", ".join(f"{count} {state}" for state, count in self._counts().items())
        lines = [f"{self.folder}: {len(self.records)} trials ({counts or 'none'})."]
        if self.best:
            lines.append(
                f"Best: trial {self.best.name}, target {self.best.target:.4f}, "
                f"{described(self.best.point)}."
            )
        if self.confirmed:
            lines.append(self.confirmed.line())
        if self.stopped_by:
            return [*lines, "Stopped; the same command goes on, and no ended trial is lost."]
        page = f"Next: mlvicx report {self.folder}; mlvicx pretrain {self.folder}/best.yaml"
        return [*lines, page]

    def _counts(self) -> dict[str, int]:
        return Counter(record.state for record in self.records)


def sweep(config: SweepConfig) -> Outcome:
    """Run the trials that have not ended yet, then the comparison; the same call again goes on.

    Raises:
        UserError: something that the user can mend, said in one sentence.
        TrainingError: every trial failed.
    """
    plan = make_plan(config)
    config, folder = plan.config, plan.folder
    with ExitStack() as stack:
        with writing(folder, "storage_path"):
            make_folder(folder)
            stack.enter_context(only_driver(folder, *SWEEP))
            check_fingerprint(folder, plan.identity, what=SWEEP)
            accept_fingerprint(folder, plan.identity)
            settings = yaml.safe_dump(to_tree(config), sort_keys=False)
            write_whole(folder / "sweep.yaml", settings.encode())
        workers = config.pretrain.workers
        needed = {kind: workers.num * amount for kind, amount in each(workers).items()}
        stack.enter_context(
            ray_session(
                # Who says how many trials the cluster will hold says that it holds one.
                {} if config.trials.concurrent else needed,
                asked="a trial (pretrain.workers.num x pretrain.workers.cpus_per_worker)",
                remedy="lower pretrain.workers.num or pretrain.workers.cpus_per_worker",
                deaf=True,
                dashboard=True,
            )
        )
        # The lock of a file system does not reach as far as a cluster.
        held = once_free(lambda: guard(str(folder), *SWEEP), GOODBYE_S)
        stack.callback(ray.kill, held)
        at_once = concurrency(plan)
        records = Records.read(folder / "trials")
        stop = Stop(stack.enter_context(signals()))
        _run_trials(plan, records, stop, at_once=at_once)
        known = records.all()
        leader = best(known)
        confirmed = None
        if not stop.asked:
            if leader is None:
                raise _all_failed(known)
            _write_best(plan, leader)
            confirmed = confirm(plan, leader, stop, at_once=at_once)
    return Outcome(folder, known, leader, confirmed, stop.asked[0] if stop.asked else 0)


def _run_trials(plan: Plan, records: Records, stop: Stop, *, at_once: int) -> None:
    """Run what is left of the trials."""
    config = plan.config
    left = plan.trials - sum(record.state in ENDED for record in records.all())
    if left <= 0:
        return
    target = to_tree(config.target)

    def given(record: Record) -> dict[str, Any]:
        storage_path = str(records.folder)
        settings = plan.space.settings(record.point, name=record.name, storage_path=storage_path)
        return {"number": record.number, "settings": settings, "target": target}

    with shown(records, trials=plan.trials, total=plan.total) as table:
        book = Book(records, table, stop, total=plan.total)
        scheduler = None
        if config.asha:
            scheduler = Rungs(
                book,
                total=plan.total,
                grace_steps=plan.grace_steps,
                reduction=config.asha.reduction,
            )
        run_tune(
            None,
            stop=stop,
            samples=left,
            at_once=at_once,
            max_failures=config.trials.max_failures,
            search=PointSearch(plan.space, config.search, book, first=plan.first, given=given),
            scheduler=scheduler,
            callbacks=[book],
        )
    for record in records.all():
        if record.state in ENDED:
            remove_checkpoints(records.folder / record.name)


def _write_best(plan: Plan, leader: Record) -> None:
    """The best configuration as a file for `mlvicx pretrain`."""
    config = plan.config
    tree = plan.space.settings(leader.point, name=f"{config.name}-best", storage_path="runs")
    head = (
        f"# The best configuration of the sweep {config.name}: trial {leader.name}, "
        f"target {leader.target:.4f} ({config.target.kind}).\n"
        f"# Command:  mlvicx pretrain {plan.folder}/best.yaml\n"
    )
    with writing(plan.folder, "storage_path"):
        text = head + yaml.safe_dump(tree, sort_keys=False)
        write_whole(plan.folder / "best.yaml", text.encode())


def _all_failed(records: list[Record]) -> TrainingError:
    """The sentence for a sweep of which no trial came to its end."""
    first = next((record for record in records if record.cause), None)
    why = f"trial {first.name} {first.state}: {first.cause.rstrip('.')}" if first else "none began"
    return TrainingError(
        f"no trial of {len(records)} came to its end; the first cause: {why}; mend it and run the "
        "same command again."
    )
