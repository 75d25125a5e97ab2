"""Checkpoints: written whole or not at all, found by digest, loaded as data only.

A checkpoint is `checkpoints/step-00000123.pt` and, written after it, `step-00000123.json` with its
SHA-256. It is whole when both are there and agree; nothing else decides (DESIGN 5, 8).
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import pickle
import shutil
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from mlvicx_dist.errors import CheckpointError, ConfigError, first_line
from mlvicx_dist.storage import (
    Place,
    becoming,
    insist,
    is_local,
    listed,
    make_folder,
    reaching,
    read_bytes,
    temporary,
    told,
    write_whole,
)

log = logging.getLogger(__name__)

FORMAT = 1
KEPT_S = 7 * 86400.0
"""How long the copy of a remote checkpoint stays on a node after it was last asked for."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""What a local disk says, and no store."""


def save_checkpoint(run_dir: Place, state: dict[str, Any], *, keep: int) -> Place:
    """Write `state` as the checkpoint of its step and remove all but the newest `keep`.

    Args:
        run_dir: Folder of the run, local or remote.
        state: `model`, `optimizer`, `step`, `since_export`, `settings`, `manifests`, `data` and
            `versions`.
        keep: How many checkpoints stay.

    Raises:
        CheckpointError: the disk is full, or the folder or store cannot be written.
    """
    folder = run_dir / "checkpoints"
    path = folder / f"step-{state['step']:08d}.pt"
    try:
        make_folder(folder)
        with becoming(path) as partial:
            with partial.open("wb") as file:
                torch.save({"format": FORMAT, **state}, file)
            seal = {
                "step": state["step"],
                "bytes": partial.stat().st_size,
                "sha256": digest(partial),
            }
        write_whole(path.with_suffix(".json"), (json.dumps(seal) + "\n").encode())
    except (OSError, RuntimeError) as error:
        # PyTorch's writer answers a full disk with a RuntimeError that comes of the OSError.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = getattr(cause, "strerror", None) or first_line(cause)
        raise CheckpointError(
            f"{path}: the checkpoint cannot be written ({reason}); free space or mend the access "
            "to it: the checkpoint before it stays."
        ) from None
    try:
        _retain(folder, path.with_suffix(".json").name, keep)
    except OSError as error:
        log.warning("%s: old checkpoints cannot be removed (%s)", folder, error)
    return path


def _retain(folder: Place, newest: str, keep: int) -> None:
    """Remove all but the newest `keep`, and those of later steps: the run went on from before."""
    with reaching(folder):
        seals = _seals(folder)
        kept = [seal for seal in seals if seal.name <= newest][:keep]
        for seal in seals:
            if seal.name not in {one.name for one in kept}:
                seal.unlink(missing_ok=True)
                seal.with_suffix(".pt").unlink(missing_ok=True)


def clear_partial(run_dir: Place) -> None:
    """Remove what a killed process left half written; only rank 0 of the run's one group may."""
    if not is_local(run_dir):
        return
    for path in (run_dir / "checkpoints").glob(".step-*.partial"):
        path.unlink(missing_ok=True)
    for path in (run_dir / "checkpoints").glob("step-*.pt"):
        if not path.with_suffix(".json").exists():
            path.unlink(missing_ok=True)
    for path in (run_dir / "exports").glob(".step-*.partial"):
        shutil.rmtree(path, ignore_errors=True)


class DamagedError(CheckpointError):
    """A checkpoint that is not what was written."""


def newest_checkpoint(
    run_dir: Place, say: Callable[[str], None] = log.warning, *, patience_s: float | None = None
) -> Place | None:
    """The newest whole checkpoint of a run; a damaged one is named to `say` and passed over.

    Args:
        run_dir: Folder of the run.
        say: Called with a sentence for each one that is damaged.
        patience_s: How long a store that fails is asked again; None: a few times.

    Returns:
        None where there is none yet.

    Raises:
        CheckpointError: the store cannot be reached, one cannot be read, or none is whole.
    """
    try:
        patience = 0 if is_local(run_dir) else patience_s
        seals = insist(run_dir, lambda: _seals(run_dir / "checkpoints"), patience)
    except OSError as error:
        raise CheckpointError(
            f"{run_dir}: its checkpoints cannot be listed ({told(error)}); check the address and "
            "your access to it."
        ) from None
    for seal in seals:
        path = seal.with_suffix(".pt")
        try:
            local_copy(path, patience_s=patience_s)
        except DamagedError as error:
            say(f"{error} The checkpoint before it is taken.")
        else:
            return path
    if seals:
        raise CheckpointError(
            f"{run_dir}: none of its {len(seals)} checkpoints is whole; restore one, or give this "
            "run another run.name to begin anew."
        )
    return None


def local_copy(path: Place, *, patience_s: float | None = None) -> Path:
    """A checkpoint that its seal says is whole, as a local file: itself, or the node's one copy.

    Raises:
        DamagedError: it or its seal is missing, or they do not agree.
        CheckpointError: it cannot be read, which says nothing of what it is.
    """
    if is_local(path):
        check_digest(path)
        return Path(path)
    folder = copies_of(path.parent)
    copy = folder / path.name

    def fetch() -> None:
        for other in [*folder.glob("*.pt"), *folder.glob(".*.partial")]:
            other.unlink()
        with becoming(copy) as partial:
            path.fs.get_file(path.path, str(partial))

    try:
        with FileLock(folder / "lock"):
            seal = read_bytes(path.with_suffix(".json"), patience_s=patience_s)
            write_whole(copy.with_suffix(".json"), seal)
            try:
                check_digest(copy)
            except DamagedError:
                insist(path, fetch, patience_s)
                check_digest(copy)
    except FileNotFoundError:
        raise DamagedError(_unsealed(path)) from None
    except DamagedError:
        raise DamagedError(_damaged(path)) from None
    except OSError as error:
        full = error.errno in NO_ROOM
        words = uncopied(copy, path, error) if full else _unreadable(path, error)
        raise CheckpointError(words) from None
    return copy


def copies_of(folder: Place) -> Path:
    """Where the node's copy of what was last asked for in a remote folder lies.

    Copies of other folders that nobody asked for in `KEPT_S` are removed.
    """
    own = temporary("checkpoints", hashlib.sha256(str(folder).encode()).hexdigest()[:16])
    os.utime(own)
    for other in own.parent.iterdir():
        with suppress(OSError):
            if time.time() - other.stat().st_mtime > KEPT_S:
                shutil.rmtree(other)
    return own


def uncopied(copy: Path, source: Place, error: OSError) -> str:
    """The sentence for a local disk that cannot take a copy."""
    return (
        f"{copy}: no copy of {source} can be written ({told(error)}); make room there, or set "
        "TMPDIR to another folder."
    )


def remove_checkpoints(run_dir: Place) -> None:
    """Free what only going on with a run would need; best effort."""
    folder = run_dir / "checkpoints"
    try:
        with reaching(folder):
            for path in listed(folder):
                path.unlink()
            if is_local(folder):
                folder.rmdir()
    except OSError:
        return


def check_digest(path: Path) -> None:
    """Compare a local checkpoint with its seal.

    Raises:
        DamagedError: one of the two is missing, or they do not agree.
        CheckpointError: they cannot be read.
    """
    if not path.exists():
        raise DamagedError(f"{path}: there is no such checkpoint; give one that exists.")
    try:
        seal = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        whole = path.stat().st_size == seal["bytes"] and digest(path) == seal["sha256"]
    except FileNotFoundError:
        raise DamagedError(_unsealed(path)) from None
    except (ValueError, KeyError, TypeError):
        whole = False
    except OSError as error:
        raise CheckpointError(_unreadable(path, error)) from None
    if not whole:
        raise DamagedError(_damaged(path))


def _unreadable(path: Place, error: OSError) -> str:
    return (
        f"{path}: the checkpoint cannot be read ({told(error)}); mend the access to it and run the "
        "same command again."
    )


def unreached(path: Place, error: OSError) -> str:
    """The sentence for a place that does not answer."""
    return f"{path}: it cannot be reached ({told(error)}); check the address and your access to it."


def _unsealed(path: Place) -> str:
    return (
        f"{path}: there is no {path.with_suffix('.json').name} beside it, which tells whether a "
        "checkpoint is whole; give a run, a step-*.pt in one, or an export folder."
    )


def _damaged(path: Place) -> str:
    return (
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
        reason = first_line(error)[:120]
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


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def newest_step(run_dir: Place) -> int:
    """The step of the newest checkpoint by its name, whole or not; 0 where there is none.

    Raises:
        OSError: the folder cannot be listed.
    """
    numbers = (seal.name[len("step-") : -len(".json")] for seal in _seals(run_dir / "checkpoints"))
    return next((int(number) for number in numbers if number.isdecimal()), 0)


def check_end(run_dir: Place, step: int, total: int) -> None:
    """See that a run is not beyond its end.

    Raises:
        ConfigError: it is.
    """
    if step > total:
        raise ConfigError(
            f"{run_dir}: its newest checkpoint is at step {step}, but these settings end at step "
            f"{total}; raise train.epochs or train.steps, or give this one another run.name."
        )


def _seals(folder: Place) -> list[Place]:
    """The seals of a folder's checkpoints, the newest first."""
    seals = [path for path in listed(folder) if fnmatch(path.name, "step-*.json")]
    return sorted(seals, key=lambda path: str(path.name), reverse=True)
