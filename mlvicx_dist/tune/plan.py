"""What a sweep is about to do, with all that can be known wrong of it found before Ray starts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import optuna

from mlvicx_dist.config import PretrainConfig, SweepConfig, to_tree
from mlvicx_dist.errors import ConfigError
from mlvicx_dist.storage import Place, place
from mlvicx_dist.stream.order import steps_per_epoch
from mlvicx_dist.train.fingerprint import fingerprint
from mlvicx_dist.train.launch import absolute, check_model, check_workers
from mlvicx_dist.train.source import open_shards, with_classes
from mlvicx_dist.tune.records import Records
from mlvicx_dist.tune.space import FUSION, LEVELS, Space, new_study, open_space
from mlvicx_dist.tune.target import chosen_parts, common_labels, judged_shards

DEFAULT_TRIALS = 24
DRAWS = 100
"""Points of a space that are tried on the settings before a trial is."""


@dataclass(frozen=True)
class Plan:
    """A sweep whose settings, data and space hold together.

    Attributes:
        config: The settings, with absolute paths.
        space: Its space.
        folder: Where it lives.
        first: Points of the first trials by number: a grid's, or the best of an earlier sweep.
        trials: How many in all.
        total: Steps of a trial.
        grace_steps: The step of the first rung.
        largest: Of the models that the space leads to, the settings that need the most memory.
        identity: What makes its trials comparable; another one of it is another sweep.
    """

    config: SweepConfig
    space: Space
    folder: Place
    first: list[dict[str, Any]]
    trials: int
    total: int
    grace_steps: int
    largest: PretrainConfig
    identity: dict[str, Any]


def make_plan(config: SweepConfig) -> Plan:
    """Check a sweep and say what it will do.

    Raises:
        UserError: something that the user can mend, said in one sentence.
    """
    config = _absolute(config)
    check_workers(config.pretrain)
    space = open_space(config)
    base, search = config.pretrain, config.search
    first = space.grid() if search.by == "grid" else _warm(config, space)
    points = first if search.by == "grid" else list(_drawn(space))
    largest = _check_points(space, points)
    shards = open_shards(base)
    with_classes(base, shards)
    per_epoch = steps_per_epoch(shards.sizes, base.train.batch_size, shards.weights)
    total = base.train.total_steps(per_epoch)
    _check_target(config, total)
    warmups = [space.config(point).train.warmup_epochs for point in [{}, *points]]
    wanted = config.asha.grace_steps if config.asha else None
    return Plan(
        config,
        space,
        place(config.storage_path) / config.name,
        first,
        _trials(config, len(first)),
        total,
        grace(total, max(warmups) * per_epoch, config.target.every_steps, wanted),
        largest,
        _identity(config, shards.digests()),
    )


def grace(total: int, warmup_steps: float, every: int, wanted: int | None) -> int:
    """The step of the first rung: where a look is, and as long after the warm-up as in it."""
    least = wanted if wanted is not None else max(total // 9, math.ceil(2 * warmup_steps))
    return min(max(math.ceil(least / every), 1) * every, total)


def _trials(config: SweepConfig, first: int) -> int:
    wanted = config.search.trials
    if config.search.by == "grid":
        return min(wanted or first, first)
    return wanted or DEFAULT_TRIALS


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


def _drawn(space: Space) -> Iterator[dict[str, Any]]:
    study = new_study()
    study.sampler = optuna.samplers.RandomSampler(seed=0)
    for _ in range(DRAWS):
        yield space.suggest(study.ask())


def _check_points(space: Space, points: list[dict[str, Any]]) -> PretrainConfig:
    """See that points are allowed as a whole and that their models can be built, each once.

    Returns:
        Of their settings those that need the most memory.
    """
    weights = [
        {FUSION: "per_level", LEVELS: levels, key: value}
        for key, value, levels in space.level_weights()
    ]
    largest, most, seen = space.base, 0.0, set()
    for point in [{}, *weights, *points]:
        try:
            config = space.config(point)
        except ConfigError as error:
            words = str(error).removeprefix("space: ")
            tried = ", ".join(f"{key}: {value}" for key, value in point.items())
            raise ConfigError(f"space: a trial with {tried} could not run, since {words}") from None
        model = (config.model.model_dump_json(), tuple(config.loss.level_weights))
        if model in seen:
            continue
        seen.add(model)
        parameters = check_model(config)
        need = parameters * config.views.image_size_px**2
        if need > most:
            largest, most = config, need
    return largest


def _check_target(config: SweepConfig, total: int) -> None:
    """Whether trials can be judged at all, and be compared in the end."""
    if config.target.every_steps > total:
        length = "steps" if config.pretrain.train.steps else "epochs"
        raise ConfigError(
            f"target.every_steps is {config.target.every_steps}, but a trial has {total} steps; "
            f"lower it, or raise pretrain.train.{length}."
        )
    for held_back in [False, True] if config.confirm.seeds else [False]:
        parts = chosen_parts(config.target, config.pretrain, held_back=held_back)
        if config.target.kind != "effective_rank":
            common_labels(config.target, parts)


def _warm(config: SweepConfig, space: Space) -> list[dict[str, Any]]:
    """The best points of an earlier sweep."""
    warm = config.search.warm_start
    if warm is None:
        return []
    earlier = [r for r in Records.read(place(warm.sweep) / "trials").all() if r.state == "finished"]
    ranked = sorted(earlier, key=lambda record: -(record.target or 0.0))
    points = [record.point for record in ranked if space.admits(record.point)][: warm.trials]
    if not points:
        raise ConfigError(
            f"search.warm_start.sweep {warm.sweep}: none of its {len(earlier)} finished trials "
            "lies in this space; widen the space or leave warm_start out."
        )
    return points


def _identity(config: SweepConfig, manifests: list[str]) -> dict[str, Any]:
    tree = to_tree(config)
    judged = tree["target"]
    judged["shards"] = judged_shards(config.target, config.pretrain, config.target.val).digests()
    return {
        "pretrain": fingerprint(config.pretrain, manifests),
        "space": tree["space"],
        "search": {key: tree["search"][key] for key in ("by", "seed")},
        "target": judged,
        "asha": tree["asha"],
    }
