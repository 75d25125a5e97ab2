"""From settings to a finished run: what can be known is checked before a worker starts.

Shards, batch, resources, the run's fingerprint and its lock are looked at here; `drive` then has
Ray run the workers, and `loop` is what they do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import yaml

from mlvicx_dist.config import PretrainConfig, to_tree
from mlvicx_dist.errors import ConfigError, DataError, ResourceError
from mlvicx_dist.session import on_cluster
from mlvicx_dist.storage import (
    Place,
    insist,
    is_local,
    make_folder,
    place,
    read_bytes,
    told,
    write_whole,
)
from mlvicx_dist.stream.order import steps_per_epoch
from mlvicx_dist.train.checkpoint import check_end, newest_step
from mlvicx_dist.train.drive import MakeJudge, drive
from mlvicx_dist.train.fingerprint import (
    accept_fingerprint,
    check_fingerprint,
    fingerprint,
    read_fingerprint,
)
from mlvicx_dist.train.owner import only_driver, take_over
from mlvicx_dist.train.shown import Row
from mlvicx_dist.train.track import check_trackers
from mlvicx_dist.train.versions import library_versions, machine


@dataclass(frozen=True)
class Outcome:
    """What `pretrain` did.

    Attributes:
        run_dir: The run's folder.
        steps: Steps done.
        resumed_from: The step that this start went on from.
        already_finished: Whether there was nothing to do.
        stopped_by: The signal that stopped it before its end, or 0.
        changes: What is not as it was when the run was begun, in words.
    """

    run_dir: Place
    steps: int
    resumed_from: int = 0
    already_finished: bool = False
    stopped_by: int = 0
    changes: str = ""


def pretrain(
    config: PretrainConfig,
    *,
    accept_changes: bool = False,
    judge: MakeJudge | None = None,
    heard: Callable[[Row], None] = lambda row: None,
) -> Outcome:
    """Run a pretraining to its end; the same call again goes on from the newest checkpoint.

    Args:
        config: The settings.
        accept_changes: Go on with a run although its settings or data were others.
        judge: Called in each worker; what it makes judges the encoder at some steps.
        heard: Called, in another thread, with each row of rank 0.

    Raises:
        UserError: something that the user can mend, said in one sentence.
    """
    from mlvicx_dist.train.memory import check_memory
    from mlvicx_dist.train.source import open_shards, with_classes

    config = absolute(config)
    run_dir = place(config.run.storage_path) / config.run.name
    shards = open_shards(config)
    config = with_classes(config, shards)
    total = config.train.total_steps(
        steps_per_epoch(shards.sizes, config.train.batch_size, shards.weights)
    )
    check_workers(config)
    check_trackers(config)
    check_model(config)
    if not on_cluster():
        least = config.workers.min or config.workers.num
        check_memory(config, least, node_workers=least, where="this machine")
    with ExitStack() as stack:
        with writing(run_dir):
            make_folder(run_dir)
            stack.enter_context(only_driver(run_dir))
        with writing(run_dir):
            wanted = fingerprint(config, shards.digests(), read_fingerprint(run_dir))
            trained, state, changes = newest_step(run_dir), _state(run_dir), ""
            # Settings that no worker has taken a checkpoint with bind nobody; those of a run that
            # is finished do, whose checkpoints may be gone.
            if trained or state:
                changes = check_fingerprint(run_dir, wanted, accept=accept_changes)
            check_end(run_dir, trained, total)
            if state.get("state") == "finished" and state.get("steps") == total:
                return Outcome(run_dir, total, total, already_finished=True)

        def begin(token: str) -> None:
            with writing(run_dir):
                insist(run_dir, lambda: take_over(run_dir, token), None)
                accept_fingerprint(run_dir, wanted)
                _write(run_dir / "config.yaml", yaml.safe_dump(to_tree(config), sort_keys=False))
                _write(run_dir / "environment.json", json.dumps(_environment(config, len(shards))))

        driven = drive(config, run_dir, total, begin=begin, judge=judge, heard=heard)
        if driven.steps:
            ended = "finished" if driven.steps == total else "stopped"
            with writing(run_dir):
                _write(run_dir / "state.json", json.dumps({"state": ended, "steps": driven.steps}))
    return Outcome(
        run_dir,
        driven.steps,
        driven.resumed_from,
        stopped_by=driven.stopped_by,
        changes=changes,
    )


def absolute(config: PretrainConfig) -> PretrainConfig:
    """The settings with absolute paths: workers start in another folder."""
    tree = to_tree(config)
    for where, key in [
        *((folder, "path") for folder in tree["data"]["shards"]),
        (tree["run"], "storage_path"),
        (tree["run"], "samples_path"),
        (tree["train"], "init_from"),
        (tree["data"], "cache_dir"),
    ]:
        if where[key]:
            there = place(where[key])
            if key in ("samples_path", "cache_dir") and not is_local(there):
                raise DataError(f"{where[key]}: {key} must be a folder of each node; give a path.")
            where[key] = str(there)
    return PretrainConfig.model_validate(tree)


def _environment(config: PretrainConfig, images: int) -> dict[str, Any]:
    return {
        "versions": library_versions(),
        "machine": machine(),
        "world_size": config.workers.num,
        "images": images,
    }


def check_workers(config: PretrainConfig) -> None:
    """See that each worker gets an image.

    Raises:
        ResourceError: there are more of them than images in a batch.
    """
    if config.workers.num > config.train.batch_size:
        raise ResourceError(
            f"workers.num is {config.workers.num}, but a batch of {config.train.batch_size} images "
            "cannot be shared by more workers than that; lower workers.num."
        )


def check_model(config: PretrainConfig) -> int:
    """Build the model without memory, and count its parameters.

    Raises:
        ConfigError: the backbone or a level does not exist, `train.recompute` cannot be had, or the
            method's loss is not installed.
    """
    from mlvicx_dist.objective.baselines import check_library
    from mlvicx_dist.train.dry import shapes_of

    check_library(config.method)
    model = shapes_of(config)
    there = model.encoder.levels
    off = set(config.loss.level_weights) - set(there)
    if off:
        raise ConfigError(
            f"loss.level_weights names level {min(off)}, but {config.model.backbone} has the "
            f"levels {', '.join(map(str, there))}; leave it out."
        )
    return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def writing(folder: Place, setting: str = "run.storage_path") -> Iterator[None]:
    """What goes wrong with the own files of a run or sweep is one sentence, naming the setting."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{folder}: the folder cannot be written ({told(error)}); set {setting} to a folder or "
            "store that can."
        ) from None


def _state(run_dir: Place) -> dict[str, Any]:
    try:
        state = json.loads(read_bytes(run_dir / "state.json"))
    except (FileNotFoundError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _write(path: Place, text: str) -> None:
    write_whole(path, (text.rstrip("\n") + "\n").encode())
