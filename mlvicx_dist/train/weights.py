"""The weights that a user means by a path: of a checkpoint, an export, or the newest of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlvicx_dist.config import PretrainConfig, parse_config, to_tree
from mlvicx_dist.errors import CheckpointError, ConfigError
from mlvicx_dist.model.encoder import Encoder, load_strictly
from mlvicx_dist.model.export_folder import EXPORT_FILES, known_of, load_export
from mlvicx_dist.model.mlvicx import build_model
from mlvicx_dist.storage import (
    Place,
    is_local,
    place,
    reaching,
    read_bytes,
    told,
    write_whole,
)
from mlvicx_dist.train.checkpoint import (
    copies_of,
    local_copy,
    newest_checkpoint,
    read_checkpoint,
    uncopied,
    unreached,
)


def find_weights(path: str | Place) -> Place:
    """What a user means by a path: a checkpoint, an export, or the newest of a run.

    Of a run its newest whole checkpoint, or where it has none its newest export.

    Raises:
        CheckpointError: there is nothing of the kind.
    """
    path = place(path)
    try:
        with reaching(path):
            if path.is_file() or (path / "encoder.safetensors").is_file():
                return path
            exists = path.exists()
    except OSError as error:
        raise CheckpointError(unreached(path, error)) from None
    if not exists:
        raise CheckpointError(
            f"{path}: there is no such file or folder; give a run, a checkpoint or an export."
        )
    newest = newest_checkpoint(path) or _newest_export(path)
    if newest is None:
        raise CheckpointError(
            f"{path}: there is no whole checkpoint in it; give a run that has saved one "
            "(checkpoints/step-*.pt) or an export folder."
        )
    return newest


def _newest_export(run_dir: Place) -> Place | None:
    """What a trial of a sweep leaves, whose checkpoints are gone."""
    folder = run_dir / "exports"
    try:
        with reaching(folder):
            found = [path for path in folder.iterdir() if (path / "config.json").is_file()]
    except OSError:
        return None
    return max(found, key=lambda path: str(path.name), default=None)


def load_encoder(path: str | Place) -> Encoder:
    """The encoder of an export folder, a checkpoint file or a run folder, in eval mode.

    Args:
        path: Export folder, `step-*.pt`, or run folder (its newest whole checkpoint).

    Returns:
        A module from images (uint8, or float in [0, 1], [B, 1 or 3, H, W]) to embeddings [B, F].

    Raises:
        CheckpointError: it is damaged, or one key is missing or extra.
    """
    weights = find_weights(path)
    if weights.is_dir():
        return load_export(local_folder(weights)).eval()
    state = read_checkpoint(local_copy(weights))
    config = settings_of(state, weights)
    model = build_model(config.model.model_copy(update={"init": "random"}), config.train.seed)
    load_strictly(model, state["model"], where=str(weights))
    return Encoder.from_model(model, config.views.image_size_px).eval()


def trained_settings(weights: Place) -> dict[str, Any]:
    """The settings of the run that a checkpoint or an export comes from, as a tree.

    Those of an export lack what does not change the mathematics, and are empty where its
    config.json does not tell them: those of earlier versions.
    """
    if not weights.is_dir():
        return to_tree(settings_of(read_checkpoint(local_copy(weights)), weights))
    found: Any = known_of(local_folder(weights))
    for key in ("training", "settings"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def settings_of(state: dict[str, Any], path: Place) -> PretrainConfig:
    """The settings that a checkpoint was trained with."""
    try:
        config = parse_config(state["settings"], str(path))
    except ConfigError as error:
        raise CheckpointError(
            f"{path}: its settings are not known to this version: {error}"
        ) from None
    assert isinstance(config, PretrainConfig)
    return config


def local_folder(folder: Place) -> Path:
    """An export folder as a local one.

    Raises:
        CheckpointError: it is not whole, cannot be read, or no copy of it can be written.
    """
    if is_local(folder):
        return Path(folder)
    try:
        files = {name: read_bytes(folder / name) for name in EXPORT_FILES}
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder}: it is no whole export ({told(error)}); write it again with 'mlvicx export'."
        ) from None
    except OSError as error:
        raise CheckpointError(unreached(folder, error)) from None
    copy = copies_of(folder)
    try:
        for name, data in files.items():
            write_whole(copy / name, data)
    except OSError as error:
        raise CheckpointError(uncopied(copy, folder, error)) from None
    return copy
