"""A sweep from its settings to its best configuration: what can be known is checked first.

The trials run under Tune and are written down by `book`; then the best configuration and the
unchanged one are trained anew by `confirm`. The same command goes on from whatever was reached.
"""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import ray
import yaml

from mlvicx_dist.config import PretrainConfig, SweepConfig, to_tree
from mlvicx_dist.errors import ConfigError, TrainingError
from mlvicx_dist.progress import say
from mlvicx_dist.session import ray_session
from mlvicx_dist.storage import Place, make_folder, place, write_whole
from mlvicx_dist.stream.order import steps_per_epoch
from mlvicx_dist.train.drive import each
from mlvicx_dist.train.fingerprint import accept_fingerprint, check_fingerprint, fingerprint
from mlvicx_dist.train.guard import guard
from mlvicx_dist.train.launch import absolute, check_model, writing
from mlvicx_dist.train.loop import Member, open_shards
from mlvicx_dist.train.owner import only_driver
from mlvicx_dist.tune.confirm import Confirmed, confirm
from mlvicx_dist.tune.records import ENDED, Record, Records, best, looks_share
from mlvicx_dist.tune.runner import concurrency, run_tune
from mlvicx_dist.tune.space import Space, described, open_space
from mlvicx_dist.tune.target import Judge

DEFAULT_TRIALS = 24
MOST_LOOKING = 0.15
"""The share of a trial's time that looks may take without a word."""


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
    records: list[Record] = field(default_factory=list)
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
        share = looks_share(self.records)
        if share > MOST_LOOKING:
            lines.append(
                f"Looks took {share:.0%} of the trials' time; raise target.every_steps or lower "
                "target.images."
            )
        if self.confirmed:
            lines.append(self.confirmed.line())
        if self.stopped_by:
            return [*lines, "Stopped; the same command goes on, and no ended trial is lost."]
        return [
            *lines,
            f"Next: mlvicx report {self.folder}; mlvicx pretrain {self.folder}/best.yaml",
        ]

    def _counts(self) -> dict[str, int]:
        return Counter(record.state for record in self.records)


def sweep(config: SweepConfig, *, accept_changes: bool = False) -> Outcome:
    """Run the trials that have not ended yet, then the comparison; the same call again goes on.

    Args:
        config: The settings.
        accept_changes: Go on although the sweep was begun with other settings or data.

    Raises:
        UserError: something that the user can mend, said in one sentence.
        TrainingError: every trial failed.
    """
    config = _absolute(config)
    space = open_space(config)
    _check_models(space)
    base = config.pretrain
    shards = open_shards(base)
    per_epoch = steps_per_epoch(shards.sizes, base.train.batch_size, shards.weights)
    total = base.train.epochs * per_epoch
    _check_target(config, total)
    first = first_points(config, space)
    trials = config.search.trials or (len(first) if config.search.by == "grid" else DEFAULT_TRIALS)
    if config.search.by == "grid":
        trials = min(trials, len(first))
    folder = place(config.storage_path) / config.name
    with ExitStack() as stack:
        with writing(folder, "storage_path"):
            make_folder(folder)
            stack.enter_context(only_driver(folder))
            wanted = _fingerprint(config, space, shards.digests())
            check_fingerprint(folder, wanted, accept=accept_changes)
            accept_fingerprint(folder, wanted)
            settings = yaml.safe_dump(to_tree(config), sort_keys=False)
            write_whole(folder / "sweep.yaml", settings.encode())
        workers = base.workers
        needed = {kind: workers.num * amount for kind, amount in each(workers).items()}
        stack.enter_context(
            ray_session(
                needed,
                asked="a trial (pretrain.workers.num x pretrain.workers.cpus_per_worker)",
                remedy="lower pretrain.workers.num or pretrain.workers.cpus_per_worker",
                dashboard=True,
            )
        )
        # The lock of a file system does not reach as far as a cluster.
        stack.callback(ray.kill, guard(str(folder)))
        records = Records.read(folder / "trials")
        at_once = concurrency(config)
        asked = stack.enter_context(_signals())
        _run_trials(
            config,
            space,
            records,
            first,
            trials=trials,
            total=total,
            per_epoch=per_epoch,
            at_once=at_once,
        )
        known = records.all()
        leader = best(known)
        if asked:
            return Outcome(folder, known, leader, stopped_by=asked[0])
        if leader is None:
            raise _all_failed(known)
        _write_best(config, folder, space, leader)
        confirmed = confirm(config, space, leader, folder, at_once=at_once, say=say)
    return Outcome(folder, known, leader, confirmed, stopped_by=asked[0] if asked else 0)


def _run_trials(
    config: SweepConfig,
    space: Space,
    records: Records,
    first: list[dict[str, Any]],
    *,
    trials: int,
    total: int,
    per_epoch: int,
    at_once: int,
) -> None:
    from mlvicx_dist.tune.book import Book
    from mlvicx_dist.tune.search import PointSearch, Rungs, grace
    from mlvicx_dist.tune.table import shown

    left = trials - sum(record.state in ENDED for record in records.all())
    if left <= 0:
        return
    target = to_tree(config.target)

    def given(record: Record) -> dict[str, Any]:
        settings = space.settings(record.point, name=record.name, storage_path=str(records.folder))
        return {"number": record.number, "settings": settings, "target": target}

    with shown(records, trials=trials, total=total) as table:
        book = Book(records, table, total=total)
        scheduler = None
        if config.asha:
            grace_steps = grace(
                total,
                int(config.pretrain.train.warmup_epochs * per_epoch),
                config.target.every_steps,
                config.asha.grace_steps,
            )
            scheduler = Rungs(
                book, total=total, grace_steps=grace_steps, reduction=config.asha.reduction
            )
        run_tune(
            None,
            samples=left,
            at_once=at_once,
            max_failures=config.trials.max_failures,
            search=PointSearch(space, config.search, book, first=first, given=given),
            scheduler=scheduler,
            callbacks=[book],
        )


def _absolute(config: SweepConfig) -> SweepConfig:
    """The settings with absolute paths: trials start in another folder."""
    tree = to_tree(config)
    tree["pretrain"] |= to_tree(absolute(config.pretrain))
    tree["storage_path"] = str(place(config.storage_path))
    if config.target.shards:
        tree["target"]["shards"] = [str(place(path)) for path in config.target.shards]
    if config.search.warm_start:
        warm = tree["search"]["warm_start"]
        warm["sweep"] = str(place(warm["sweep"]))
    return SweepConfig.model_validate(tree)


def _check_models(space: Space) -> None:
    """Build, without memory, every model that a choice leads to."""
    choices = [
        {key: value}
        for key, dimension in space.dimensions.items()
        if key.startswith("model.") and dimension.choice is not None
        for value in dimension.choice
    ]
    for point in [{}, *choices]:
        check_model(space.config(point))


def _check_target(config: SweepConfig, total: int) -> None:
    """Whether trials can be judged at all: splits, labels, and a look before the end."""
    import torch

    if config.target.every_steps > total:
        raise ConfigError(
            f"target.every_steps is {config.target.every_steps}, but a trial has {total} steps; "
            "lower it, or raise pretrain.train.epochs."
        )
    for split in config.pretrain.data.splits:
        if split in (config.target.val, "test"):
            raise ConfigError(
                f"pretrain.data.splits names '{split}', whose images trials must not be trained "
                "on; leave it out."
            )
    Judge(config.target, config.pretrain, Member(0, 1, torch.device("cpu")))


def first_points(config: SweepConfig, space: Space) -> list[dict[str, Any]]:
    """The points of the first trials: a grid's, or the best of an earlier sweep."""
    if config.search.by == "grid":
        return space.grid()
    warm = config.search.warm_start
    if warm is None:
        return []
    earlier = [r for r in Records.read(place(warm.sweep) / "trials").all() if r.state == "finished"]
    ranked = sorted(earlier, key=lambda r: -(r.target or 0.0))
    points = [record.point for record in ranked if space.admits(record.point)][: warm.trials]
    if not points:
        raise ConfigError(
            f"search.warm_start.sweep {warm.sweep}: none of its {len(earlier)} finished trials "
            "lies in this space; widen the space or leave warm_start out."
        )
    return points


def _fingerprint(config: SweepConfig, space: Space, manifests: list[str]) -> dict[str, Any]:
    """What makes trials comparable: another one of it is another sweep."""
    tree = to_tree(config)
    search = {key: tree["search"][key] for key in ("by", "seed")}
    return {
        "pretrain": fingerprint(space.base, manifests),
        "space": tree["space"],
        "search": search,
        "target": tree["target"],
        "asha": tree["asha"],
    }


def _write_best(config: SweepConfig, folder: Place, space: Space, leader: Record) -> None:
    """The best configuration as a file for `mlvicx pretrain`."""
    tree = space.settings(leader.point, name=f"{config.name}-best", storage_path="runs")
    tree["checkpoint"] = to_tree(PretrainConfig.model_validate(tree).checkpoint)
    head = (
        f"# The best configuration of the sweep {config.name}: trial {leader.name}, "
        f"target {leader.target:.4f} ({config.target.kind}).\n"
        "# Command:  mlvicx pretrain best.yaml\n"
    )
    with writing(folder, "storage_path"):
        text = head + yaml.safe_dump(tree, sort_keys=False)
        write_whole(folder / "best.yaml", text.encode())


def _all_failed(records: list[Record]) -> TrainingError:
    """The sentence for a sweep of which no trial came to its end."""
    bad = [record for record in records if record.cause]
    first = bad[0] if bad else None
    why = f"trial {first.name} {first.state}: {first.cause.rstrip('.')}" if first else "none began"
    return TrainingError(
        f"no trial of {len(records)} came to its end; the first cause: {why}; mend it and run the "
        "same command again."
    )


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The first SIGTERM or Ctrl-C while the block runs; Tune then ends its trials by itself."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def handle(number: int, frame: Any) -> None:
        asked.append(number)
        if number == signal.SIGTERM:
            signal.raise_signal(signal.SIGINT)
        else:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
