"""What a comparison will do, once its settings and data are seen to hold together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mlvicx_dist.config import CompareConfig, Task, to_tree
from mlvicx_dist.errors import ConfigError, DataError
from mlvicx_dist.evaluate.comparison import read_diverged, scores_path
from mlvicx_dist.evaluate.methods import Method, methods_of
from mlvicx_dist.evaluate.parts import splits_of
from mlvicx_dist.storage import Place, is_local, place
from mlvicx_dist.stream.order import steps_per_epoch
from mlvicx_dist.stream.shardset import ShardSet
from mlvicx_dist.train.fingerprint import (
    check_fingerprint,
    fingerprint,
    read_fingerprint,
    weights_digest,
)
from mlvicx_dist.train.launch import absolute, check_model, check_workers
from mlvicx_dist.train.source import open_shards, with_classes

COMPARISON = ("comparison", "name")
"""What is refused, in the words of a comparison's settings."""
SAME_SCORES = {
    "data": ("loader_workers", "cache_dir", "cache_gb"),
    "embedding": ("batch_size", "use_gpu"),
}
"""Settings of a task that leave its scores as they are."""
PACE = {
    "workers": ("num", "min", "cpus_per_worker", "use_gpu"),
    "data": ("loader_workers",),
    "train": ("recompute", "gather_rows"),
}
"""Settings of a pretraining that change its seconds of a step and none of its numbers."""
INIT = "train.init_from"
"""The setting of a method that is a place."""


@dataclass(frozen=True)
class Plan:
    """A comparison whose settings and data hold together.

    Attributes:
        config: The settings, with absolute paths.
        folder: Where it lives.
        methods: In the order of the settings.
        total: Steps of the common settings.
        identity: What makes its runs comparable; another one of it is another comparison.
    """

    config: CompareConfig
    folder: Place
    methods: list[Method]
    total: int
    identity: dict[str, Any]

    def left(self) -> list[tuple[Method, int]]:
        """Methods and seeds that some task has not judged; seed by seed."""
        known = read_diverged(self.folder)
        pairs: dict[str, tuple[Method, int]] = {}
        for seed in self.config.seeds:
            for method in self.methods:
                # Raw pixels are one run for all seeds.
                pairs.setdefault(method.run(seed), (method, seed))
        return [pair for run, pair in pairs.items() if run not in known and self.unjudged(*pair)]

    def unjudged(self, method: Method, seed: int) -> list[Task]:
        """The tasks that have not judged a run."""
        return [
            task
            for task in self.config.tasks
            if not scores_path(self.folder, task.name, method.run(seed)).exists()
        ]


def make_plan(config: CompareConfig) -> Plan:
    """Check a comparison and say what it will do.

    Raises:
        UserError: something that the user can mend, said in one sentence.
    """
    config = _absolute(config)
    check_workers(config.pretrain)
    methods = methods_of(config)
    shards = open_shards(config.pretrain)
    for k, method in enumerate(methods):
        try:
            check_model(method.settings)
            if not method.floor:
                methods[k] = replace(method, settings=with_classes(method.settings, shards))
        except ConfigError as error:
            raise ConfigError(f"methods.{method.name}: {error}") from None
    train = config.pretrain.train
    per_epoch = steps_per_epoch(shards.sizes, train.batch_size, shards.weights)
    return Plan(
        config,
        place(config.storage_path) / config.name,
        methods,
        train.total_steps(per_epoch),
        _identity(config, shards.digests()),
    )


def _absolute(config: CompareConfig) -> CompareConfig:
    """The settings with absolute paths: workers start in another folder."""
    if not is_local(place(config.storage_path)):
        raise DataError(
            f"{config.storage_path}: a comparison is kept in a folder; set storage_path to one "
            "that all nodes see."
        )
    tree = to_tree(config)
    tree["pretrain"] |= to_tree(absolute(config.pretrain))
    tree["storage_path"] = str(place(config.storage_path))
    for changes in tree["methods"].values():
        if isinstance(weights := changes.get(INIT), str):
            changes[INIT] = str(place(weights))
    for task in tree["tasks"]:
        task["data"]["shards"] = [str(place(path)) for path in task["data"]["shards"]]
    return CompareConfig.model_validate(tree)


def _identity(config: CompareConfig, manifests: list[str]) -> dict[str, Any]:
    common = fingerprint(config.pretrain, manifests)
    common["train"].pop("seed")
    if config.budget == "time":
        # What else the seconds of a step follow from.
        tree = to_tree(config.pretrain)
        for section, keys in PACE.items():
            common[section] = common.get(section, {}) | {key: tree[section][key] for key in keys}
    methods = to_tree(config)["methods"]
    for changes in methods.values():
        if changes.get(INIT):
            changes[INIT] = weights_digest(changes[INIT])
    tasks: dict[str, Any] = {}
    for task in config.tasks:
        tree = to_tree(task)
        for section, keys in SAME_SCORES.items():
            for key in keys:
                tree[section].pop(key)
        opened = ShardSet.open(task.data.shards, splits=splits_of(task))
        tree["data"]["shards"] = opened.digests()
        tasks[task.name] = tree
    return {
        "pretrain": common,
        "methods": methods,
        "tasks": tasks,
        # What the others' length follows from.
        "budget": config.budget if config.budget == "images" else f"the time of {config.first}",
    }


def checked(plan: Plan) -> dict[str, Any]:
    """What is to be its fingerprint, if the comparison is still the one that was begun.

    Methods and tasks may be added.

    Raises:
        CheckpointError: something changed; names what.
    """
    known = read_fingerprint(plan.folder) or plan.identity
    wanted = {
        **plan.identity,
        **{
            kind: {name: plan.identity[kind].get(name, one) for name, one in known[kind].items()}
            for kind in ("methods", "tasks")
        },
    }
    check_fingerprint(plan.folder, wanted, what=COMPARISON)
    # One that is left out today may come back as it was.
    return wanted | {kind: wanted[kind] | plan.identity[kind] for kind in ("methods", "tasks")}
