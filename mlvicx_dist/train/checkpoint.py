"""Checkpoints: written whole or not at all, found by digest, loaded as data only.

A checkpoint is `checkpoints/step-00000123.pt` and, written after it, `step-00000123.json` with its
SHA-256. It is whole when both are there and agree; nothing else decides (DESIGN 5, 8).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from mlvicx_dist.config import PretrainConfig, parse_config
from mlvicx_dist.errors import CheckpointError, ConfigError
from mlvicx_dist.model.encoder import Encoder, load_export, load_strictly
from mlvicx_dist.model.mlvicx import build_model

log = logging.getLogger(__name__)

FORMAT = 1


def save_checkpoint(run_dir: Path, state: dict[str, Any], *, keep: int) -> Path:
    """Write `state` as the checkpoint of its step and remove all but the newest `keep`.

    Args:
        run_dir: Folder of the run.
        state: `model`, `optimizer`, `step`, `settings`, `manifests` and `versions`.
        keep: How many checkpoints stay.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written.
    """
    folder = run_dir / "checkpoints"
    path = folder / f"step-{state['step']:08d}.pt"
    partial = path.with_suffix(".partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        seal = {"step": state["step"], "bytes": partial.stat().st_size, "sha256": digest(partial)}
        partial.replace(path)
        partial.write_text(json.dumps(seal) + "\n", encoding="utf-8")
        partial.replace(path.with_suffix(".json"))
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        # PyTorch's writer answers a full disk with a RuntimeError of its own.
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: the checkpoint cannot be written ({reason}); free space or mend the "
            "folder's rights and run the same command again: it goes on from the one before."
        ) from None
    for seal_path in _seals(folder)[keep:]:
        seal_path.unlink(missing_ok=True)
        seal_path.with_suffix(".pt").unlink(missing_ok=True)
    return path


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run; a damaged one is named in the log and passed over."""
    for seal_path in _seals(run_dir / "checkpoints"):
        path = seal_path.with_suffix(".pt")
        try:
            check_digest(path)
        except CheckpointError as error:
            log.warning("%s The checkpoint before it is taken.", error)
        else:
            return path
    return None


def check_digest(path: Path) -> None:
    """Compare a checkpoint with its seal.

    Raises:
        CheckpointError: one of the two is missing, or they do not agree.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such checkpoint; give one that exists.")
    try:
        seal = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        whole = path.stat().st_size == seal["bytes"] and digest(path) == seal["sha256"]
    except (OSError, ValueError, KeyError):
        whole = False
    if not whole:
        raise CheckpointError(
            f"{path}: the checkpoint is damaged (it does not match the SHA-256 beside it); "
            "use an older one from the same folder."
        )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint whose digest was checked, onto the CPU, as tensors and plain values only.

    Raises:
        CheckpointError: it is no checkpoint of ours.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError) as error:
        reason = str(error).splitlines()[0][:120]
        raise CheckpointError(
            f"{path}: it cannot be read as a checkpoint ({reason}); give a step-*.pt of a run."
        ) from None
    if not isinstance(state, dict) or not {"format", "model", "settings"} <= state.keys():
        raise CheckpointError(f"{path}: it is no checkpoint of mlvicx; give a step-*.pt of a run.")
    if state["format"] > FORMAT:
        raise CheckpointError(
            f"{path}: it was written by a newer mlvicx_dist ({state['versions']['mlvicx_dist']}); "
            "install that version or a later one."
        )
    return state


def settings_of(state: dict[str, Any], path: Path) -> PretrainConfig:
    """The settings that a checkpoint was trained with."""
    try:
        config = parse_config(state["settings"], str(path))
    except ConfigError as error:
        raise CheckpointError(
            f"{path}: its settings are not known to this version: {error}"
        ) from None
    assert isinstance(config, PretrainConfig)
    return config


def find_weights(path: str | Path) -> Path:
    """What a user means by a path: a checkpoint, an export folder, or a run's newest checkpoint.

    Raises:
        CheckpointError: there is nothing of the kind.
    """
    path = Path(path)
    if path.is_file() or (path / "encoder.safetensors").is_file():
        return path
    if not path.exists():
        raise CheckpointError(
            f"{path}: there is no such file or folder; give a run, a checkpoint or an export."
        )
    newest = newest_checkpoint(path)
    if newest is None:
        raise CheckpointError(
            f"{path}: there is no whole checkpoint in it; give a run that has saved one "
            "(checkpoints/step-*.pt) or an export folder."
        )
    return newest


def load_encoder(path: str | Path) -> Encoder:
    """The encoder of an export folder, a checkpoint file or a run folder, in eval mode.

    Args:
        path: Export folder, `step-*.pt`, or run folder (its newest whole checkpoint).

    Returns:
        A module from images (uint8, or float in [0, 1], [B, 1 or 3, H, W]) to embeddings [B, F].

    Raises:
        CheckpointError: it is damaged, or one key is missing or extra.
    """
    path = find_weights(path)
    if path.is_dir():
        return load_export(path).eval()
    check_digest(path)
    state = read_checkpoint(path)
    config = settings_of(state, path)
    model = build_model(config.model.model_copy(update={"init": "random"}), config.train.seed)
    load_strictly(model, state["model"], where=str(path))
    return Encoder.from_model(model, config.views.image_size_px).eval()


def training_seed(path: Path) -> int:
    """The seed of the run that a checkpoint comes from; 0 for an export, which does not tell."""
    return 0 if path.is_dir() else settings_of(read_checkpoint(path), path).train.seed


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seals(folder: Path) -> list[Path]:
    """The seals of a folder's checkpoints, the newest first."""
    return sorted(folder.glob("step-*.json"), reverse=True)
