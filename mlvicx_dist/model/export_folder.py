"""The export folder: encoder.safetensors, config.json, a model card, and more where asked."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mlvicx_dist.config import Model
from mlvicx_dist.errors import CheckpointError, first_line
from mlvicx_dist.model.encoder import Encoder, load_strictly
from mlvicx_dist.storage import Place, becoming, is_local, told, write_whole

WEIGHTS, CARD, DESCRIPTION = "encoder.safetensors", "README.md", "config.json"
EXPORT_FILES = (CARD, WEIGHTS, DESCRIPTION)
"""What every export holds; `config.json` is written last."""


def save_export(
    encoder: Encoder,
    folder: Place,
    *,
    card: str,
    known: Mapping[str, Any],
    more: Mapping[str, bytes] | None = None,
) -> None:
    """Write an export; a local folder appears whole, in the place of one that was there.

    Args:
        encoder: What is exported.
        folder: Where to, local or remote.
        card: The text of its README.md.
        known: What `config.json` tells of it: `training`, `evaluation` (lines of the card).
        more: Further files by name.

    Raises:
        CheckpointError: the folder or store cannot be written.
    """
    more = more or {}
    try:
        if is_local(folder):
            _save(encoder, folder, card, known, more)
            return
        with tempfile.TemporaryDirectory(prefix="mlvicx-export-") as scratch:
            local = Path(scratch) / "export"
            _save(encoder, local, card, known, more)
            for name in (*more, *EXPORT_FILES):
                write_whole(folder / name, (local / name).read_bytes())
    except (OSError, SafetensorError) as error:
        # The writer of safetensors says what the system said last.
        reason = told(error) if isinstance(error, OSError) else str(error).rpartition(": ")[2]
        raise CheckpointError(
            f"{folder}: the export cannot be written ({reason}); free space, mend your access to "
            "it or choose another folder."
        ) from None


def _save(
    encoder: Encoder,
    folder: Path,
    card: str,
    known: Mapping[str, Any],
    more: Mapping[str, bytes],
) -> None:
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    description = {
        "model": encoder.settings.model_dump(mode="json", by_alias=True),
        "image_size_px": encoder.image_size_px,
        "features": encoder.features,
        **known,
    }
    weights = {k: v.detach().cpu().contiguous() for k, v in encoder.state_dict().items()}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with becoming(partial / WEIGHTS) as file:
            save_file(weights, file)
        for name, data in more.items():
            write_whole(partial / name, data)
        write_whole(partial / CARD, card.encode())
        write_whole(partial / DESCRIPTION, (json.dumps(description, indent=1) + "\n").encode())
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_export(folder: Path) -> Encoder:
    """The encoder of an export folder.

    Raises:
        CheckpointError: a file is missing or damaged, or one key is missing or extra.
    """
    try:
        description = _description(folder)
        settings = Model.model_validate(description["model"])
        size = int(description["image_size_px"])
        weights = load_file(folder / WEIGHTS)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"{folder}: its config.json is not known to this version (model.{key}: "
            f"{first['msg']}); export it again, or install the version that wrote it."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(_no_export(folder, error)) from None
    encoder = Encoder.bare(settings, size)
    load_strictly(encoder, weights, where=str(folder))
    return encoder


def known_of(folder: Path) -> dict[str, Any]:
    """What the `config.json` of an export tells of it, see `save_export`.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        description = _description(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(_no_export(folder, error)) from None
    return {key: description[key] for key in ("training", "evaluation") if key in description}


def _description(folder: Path) -> dict[str, Any]:
    description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    if not isinstance(description, dict):
        raise ValueError(f"{DESCRIPTION} holds no settings")
    return description


def _no_export(folder: Path, error: Exception) -> str:
    """The sentence for a folder that cannot be used."""
    if isinstance(error, FileNotFoundError) and error.filename:
        reason = f"{Path(error.filename).name} is missing"
    elif isinstance(error, OSError):
        reason = told(error)
    elif isinstance(error, KeyError):
        reason = f"{DESCRIPTION} has no {error}"
    else:
        reason = first_line(error)
    return f"{folder}: it is no whole export ({reason}); write it again with 'mlvicx export'."
