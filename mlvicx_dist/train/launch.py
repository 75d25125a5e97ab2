"""From settings to a finished run on Ray Train: checks first, then the trainer, then the words.

Everything that can be known before a worker starts is checked here: shards, batch, resources, the
run's fingerprint and its lock. Ray owns processes and restarts; the loop owns the state.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from mlvicx_dist.config import PretrainConfig, parse_config, to_tree
from mlvicx_dist.errors import CheckpointError, DataError, ResourceError, TrainingError
from mlvicx_dist.progress import progress
from mlvicx_dist.session import ray_session
from mlvicx_dist.stream.order import steps_per_epoch
from mlvicx_dist.stream.shardset import ShardSet
from mlvicx_dist.train.checkpoint import digest, find_weights
from mlvicx_dist.train.versions import library_versions, machine

log = logging.getLogger(__name__)

NOT_MATHEMATICS = {"train": ("log_every_steps",), "data": ("loader_workers",)}
"""Settings that leave every number of a run as it is."""


@dataclass(frozen=True)
class Outcome:
    """What `pretrain` did."""

    run_dir: Path
    steps: int
    resumed_from: int
    already_finished: bool


def pretrain(config: PretrainConfig) -> Outcome:
    """Run a pretraining to its end; the same call again goes on from the newest checkpoint.

    Raises:
        UserError: something that the user can mend, said in one sentence.
    """
    config = _absolute(config)
    run_dir = Path(config.run.storage_path) / config.run.name
    shards = ShardSet.open(
        [folder.path for folder in config.data.shards],
        splits=config.data.splits,
        weights=[folder.weight for folder in config.data.shards],
    )
    total = config.train.epochs * steps_per_epoch(
        shards.sizes, config.train.batch_size, shards.weights
    )
    if config.workers.num > config.train.batch_size:
        raise ResourceError(
            f"workers.num is {config.workers.num}, but a batch of {config.train.batch_size} images "
            "cannot be shared by more workers than that; lower workers.num."
        )
    _check_model(config)
    _make(run_dir)
    with _only_driver(run_dir):
        _check_fingerprint(run_dir, fingerprint(config, shards.digests()))
        if _state(run_dir).get("state") == "finished":
            return Outcome(run_dir, total, total, already_finished=True)
        _write(run_dir / "config.yaml", yaml.safe_dump(to_tree(config), sort_keys=False))
        environment = {
            "versions": library_versions(),
            "machine": machine(),
            "world_size": config.workers.num,
            "images": len(shards),
        }
        _write(run_dir / "environment.json", json.dumps(environment, indent=1))
        resumed = _run(config, run_dir, total)
        _write(run_dir / "state.json", json.dumps({"state": "finished", "steps": total}))
    return Outcome(run_dir, total, resumed, already_finished=False)


def train_worker(plan: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    import ray.train
    import ray.train.torch
    import torch

    from mlvicx_dist.train.loop import Place, train

    config = parse_config(plan["settings"], "the run's settings")
    assert isinstance(config, PretrainConfig)
    torch.set_num_threads(config.workers.cpus_per_worker)
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    place = Place(context.get_world_rank(), context.get_world_size(), device)
    train(config, Path(plan["run_dir"]), place, report=ray.train.report)


def fingerprint(config: PretrainConfig, manifests: list[str]) -> dict[str, Any]:
    """What decides a run's numbers: settings and data. Another one is another run."""
    tree = to_tree(config)
    for section, keys in NOT_MATHEMATICS.items():
        for key in keys:
            del tree[section][key]
    tree["data"]["shards"] = [
        {"manifest": manifest, "weight": folder.weight}
        for manifest, folder in zip(manifests, config.data.shards, strict=True)
    ]
    if config.train.init_from:
        weights = find_weights(config.train.init_from)
        file = weights / "encoder.safetensors" if weights.is_dir() else weights
        tree["train"]["init_from"] = digest(file)
    return {key: tree[key] for key in ("method", "data", "views", "model", "loss", "train")}


def _absolute(config: PretrainConfig) -> PretrainConfig:
    """The settings with absolute paths: workers start in another folder."""
    tree = to_tree(config)
    for place, key in [
        *((folder, "path") for folder in tree["data"]["shards"]),
        (tree["run"], "storage_path"),
        (tree["train"], "init_from"),
    ]:
        if place[key] and "://" in place[key]:
            raise DataError(f"{place[key]}: only local folders can be used; copy it to one.")
        if place[key]:
            place[key] = str(Path(place[key]).expanduser().absolute())
    return PretrainConfig.model_validate(tree)


def _check_model(config: PretrainConfig) -> None:
    """Build the model without memory: a backbone or level that does not exist ends here."""
    import torch

    from mlvicx_dist.model.mlvicx import build_model

    with torch.device("meta"):
        build_model(config.model.model_copy(update={"init": "random"}), 0)


def _make(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / ".lock").touch()
    except OSError as error:
        raise DataError(
            f"{run_dir}: the run's folder cannot be written ({error.strerror}); "
            "set run.storage_path to a folder that can."
        ) from None


@contextmanager
def _only_driver(run_dir: Path) -> Iterator[None]:
    """One driver a run: a lock that the system releases when its owner dies."""
    lock = FileLock(run_dir / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ResourceError(
            f"{run_dir}: another process is training this run; wait for it or stop it, "
            "or give this one another run.name."
        ) from None
    try:
        yield
    finally:
        lock.release()


def _check_fingerprint(run_dir: Path, wanted: dict[str, Any]) -> None:
    """Refuse to go on with a run whose settings or data were others."""
    path = run_dir / "fingerprint.json"
    if not path.exists():
        _write(path, json.dumps(wanted, indent=1))
        return
    there = json.loads(path.read_text(encoding="utf-8"))
    old, new = _flat(there), _flat(wanted)
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if changed:
        named = "; ".join(f"{k} was {old.get(k)} and is {new.get(k)}" for k in changed[:3])
        more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise CheckpointError(
            f"{run_dir}: a run of this name was made with other settings ({named}{more}); "
            "give this one another run.name, or the old settings to go on with that one."
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict | list):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _state(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "state.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    partial.replace(path)


def _run(config: PretrainConfig, run_dir: Path, total: int) -> int:
    """Launch the trainer and show its progress; the step that it went on from."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    from mlvicx_dist.train.watch import Forward, user_error, watching

    workers = config.workers
    with _cluster(config), tempfile.TemporaryDirectory(prefix="mlvicx-run-") as scratch:
        channel = Path(scratch) / "rows.jsonl"
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"settings": to_tree(config), "run_dir": str(run_dir)},
            scaling_config=ScalingConfig(
                num_workers=(workers.min, workers.num) if workers.min else workers.num,
                use_gpu=workers.use_gpu,
                resources_per_worker={
                    "CPU": workers.cpus_per_worker,
                    **({"GPU": 1} if workers.use_gpu else {}),
                },
            ),
            run_config=RunConfig(
                name="ray",
                storage_path=str(run_dir),
                failure_config=FailureConfig(
                    max_failures=workers.max_failures, controller_failure_limit=10
                ),
                callbacks=[Forward(channel)],
            ),
            torch_config=TorchConfig(timeout_s=int(workers.collective_timeout_s)),
        )
        with progress("training", total, "steps") as bar:
            show = _Shown(bar)
            try:
                with watching(channel, show):
                    trainer.fit()
            except TrainingFailedError as error:
                cause = user_error(error)
                if cause:
                    raise cause from None
                words = str(error).strip().splitlines()
                raise TrainingError(
                    f"{run_dir}: the workers failed {workers.max_failures + 1} times, the last "
                    f"time with: {words[-1] if words else type(error).__name__}; their logs are in "
                    f"{ray._private.worker._global_node.get_session_dir_path()}/logs, and the same "
                    "command goes on from the newest checkpoint."
                ) from error
    return show.resumed


class _Shown:
    """Rows of the workers as progress on the driver."""

    def __init__(self, bar: Any) -> None:
        self._bar, self._step, self.resumed = bar, 0, 0

    def __call__(self, row: dict[str, Any]) -> None:
        if "died" in row:
            self._bar.say(f"{row['died']}; going on from the newest checkpoint")
            return
        if self._step == 0 and row["resumed"]:
            self._step = self.resumed = int(row["resumed"])
            self._bar.skip(self._step)
        terms = ", ".join(
            f"{name} {row[name]:.3g}" for name in row if name.endswith("_weighted")
        ).replace("_weighted", "")
        self._bar.advance(
            int(row["step"]) - self._step,
            f"{row['images_per_s']:.0f} images/s, data wait {row['data_wait']:.0%}, "
            f"loss {row['loss']:.4g} ({terms})",
        )
        self._step = int(row["step"])


@contextmanager
def _cluster(config: PretrainConfig) -> Iterator[None]:
    """Ray with room for the least number of workers."""
    workers = config.workers
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(workers.start_timeout_s)
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(workers.collective_timeout_s)
    least = workers.min or workers.num
    needed = {"CPU": least * workers.cpus_per_worker}
    if workers.use_gpu:
        needed["GPU"] = least
    with ray_session(
        needed,
        asked="workers.num x workers.cpus_per_worker",
        remedy="lower workers.num or workers.cpus_per_worker",
    ):
        logging.getLogger("ray.train").setLevel(logging.ERROR)
        yield
