"""What decides a run's numbers: settings and data. Another fingerprint is another run."""

from __future__ import annotations

import json
from typing import Any

from mlvicx_dist.config import LOSS_KEYS, PretrainConfig, flat, to_tree
from mlvicx_dist.errors import CheckpointError
from mlvicx_dist.storage import Place, read_bytes, write_whole
from mlvicx_dist.train.checkpoint import digest, local_copy
from mlvicx_dist.train.weights import find_weights, local_folder

FILE = "fingerprint.json"
NOT_MATHEMATICS = {
    "train": ("log_every_steps", "recompute"),
    "data": ("loader_workers", "cache_dir", "cache_gb"),
}
"""Settings that leave every number of a run as it is."""


def fingerprint(
    config: PretrainConfig, manifests: list[str], known: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The settings that change the mathematics, and the digests of what is read.

    Args:
        config: The settings.
        manifests: The digest of each shard folder's manifest.
        known: The fingerprint of the run that is there: it needs no more what it began with.

    Raises:
        CheckpointError: the weights to begin with are not there.
    """
    tree = to_tree(config)
    for section, keys in NOT_MATHEMATICS.items():
        for key in keys:
            tree[section].pop(key, None)
    if config.train.gradients == "float32":
        # Then rows are as exact as gradients, as another size of the group is.
        tree["train"].pop("gather_rows")
    tree["loss"] = {key: tree["loss"][key] for key in LOSS_KEYS[config.method]}
    tree["data"]["shards"] = [
        {"manifest": manifest, "weight": folder.weight}
        for manifest, folder in zip(manifests, config.data.shards, strict=True)
    ]
    if config.train.init_from:
        try:
            tree["train"]["init_from"] = weights_digest(config.train.init_from)
        except CheckpointError:
            began_with = (known or {}).get("train", {}).get("init_from")
            if not began_with:
                raise
            tree["train"]["init_from"] = began_with
    return {key: tree[key] for key in ("method", "data", "views", "model", "loss", "train")}


def weights_digest(init_from: str) -> str:
    """The digest of the weights that `train.init_from` means.

    Raises:
        CheckpointError: there are none.
    """
    weights = find_weights(init_from)
    folder = weights.is_dir()
    return digest(local_folder(weights) / "encoder.safetensors" if folder else local_copy(weights))


def check_fingerprint(
    run_dir: Place,
    wanted: dict[str, Any],
    *,
    accept: bool | None = None,
    what: tuple[str, str] = ("run", "run.name"),
) -> str:
    """Refuse to go on with a run whose settings or data were others, unless it is accepted.

    Args:
        run_dir: Its folder.
        wanted: Its fingerprint by the settings of today.
        accept: Whether changes are accepted; None: they cannot be.
        what: What it is, and the setting that gives its name.

    Returns:
        What changed, in words; nothing where nothing did.

    Raises:
        CheckpointError: something changed; names what.
    """
    changed: list[str] = []
    there = read_fingerprint(run_dir)
    if there is not None:
        old, new = flat(there, lists=True), flat(wanted, lists=True)
        changed = [
            f"{key} was {old.get(key)} and is {new.get(key)}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        ]
    named = "; ".join(changed[:3]) + (f"; and {len(changed) - 3} more" if changed[3:] else "")
    if accept and any(one.startswith("model.") for one in changed):
        raise CheckpointError(
            f"{run_dir}: its checkpoints are of another model ({named}), which cannot be accepted; "
            "give this one another run.name, or train.init_from to start from its encoder."
        )
    if changed and not accept:
        kind, key = what
        accepted = ", or --accept-changes to go on with the new ones" if accept is False else ""
        raise CheckpointError(
            f"{run_dir}: a {kind} of this name was made with other settings ({named}); "
            f"give this one another {key}, or the old settings to go on with that one{accepted}."
        )
    return named


def accept_fingerprint(run_dir: Place, wanted: dict[str, Any]) -> None:
    """Let it be the run's."""
    write_whole(run_dir / FILE, (json.dumps(wanted, indent=1) + "\n").encode())


def read_fingerprint(run_dir: Place) -> dict[str, Any] | None:
    """The fingerprint that is there, or None.

    Raises:
        CheckpointError: it is damaged.
    """
    path = run_dir / FILE
    try:
        tree = json.loads(read_bytes(path))
    except FileNotFoundError:
        return None
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        raise CheckpointError(
            f"{path}: the run's fingerprint is damaged; restore it, or remove it if the settings "
            "are still those that the run was made with."
        )
    return tree
