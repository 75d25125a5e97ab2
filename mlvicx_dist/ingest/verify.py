"""Is a shard folder what its manifest says? Every digest, index, label and image is looked at."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlvicx_dist.errors import DataError
from mlvicx_dist.ingest.record import ALLOWED_KEYS
from mlvicx_dist.ingest.shards import (
    Manifest,
    ShardInfo,
    build_index,
    decode_image,
    read_index,
    read_manifest,
)
from mlvicx_dist.progress import Progress


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a shard folder, and how it is mended."""

    folder: Path
    shards: int
    samples: int
    problems: tuple[str, ...]

    @property
    def repair(self) -> str:
        """The way back to a whole folder."""
        return (
            f"remove the shards named above and {self.folder}/manifest.json, then run the same "
            "sharding command again: it packs what is missing"
        )

    def document(self) -> dict[str, Any]:
        """The verdict as JSON values."""
        return {
            "folder": str(self.folder),
            "shards": self.shards,
            "samples": self.samples,
            "problems": list(self.problems),
        }

    def lines(self) -> list[str]:
        """The verdict in words."""
        if not self.problems:
            return [f"{self.folder}: {self.samples} samples in {self.shards} shards, all whole."]
        return [*self.problems, f"{len(self.problems)} problems; to mend them, {self.repair}."]


@dataclass
class _Seen:
    """What one shard holds."""

    info: ShardInfo
    problems: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    patients: set[tuple[str, str]] = field(default_factory=set)


def verify(folder: str | Path, *, workers: int = 1, progress: Progress | None = None) -> Verdict:
    """Check a shard folder against its manifest.

    Args:
        folder: The folder.
        workers: Processes.
        progress: Counts samples.

    Raises:
        DataError: there is no manifest to check against.
    """
    manifest = read_manifest(folder)
    problems: list[str] = []
    keys: Counter[str] = Counter()
    splits: dict[tuple[str, str], str] = {}
    torn = 0
    for seen in _run(manifest, workers):
        problems += seen.problems
        keys.update(seen.keys)
        for patient in seen.patients:
            torn += splits.setdefault(patient, seen.info.split) != seen.info.split
        if progress:
            progress.advance(seen.info.samples)
    twice = sum(count > 1 for count in keys.values())
    if twice:
        problems.append(f"{manifest.folder}: {twice} keys stand in more than one place")
    if torn:
        problems.append(f"{manifest.folder}: {torn} patients are in two splits")
    totals = Counter[str]()
    for shard in manifest.shards:
        totals[shard.split] += shard.samples
    if dict(totals) != dict(manifest.splits):
        problems.append(f"{manifest.folder}/manifest.json: the split counts do not add up")
    known = {shard.name for shard in manifest.shards}
    stray = sorted(p.name for p in manifest.folder.glob("*.tar") if p.name not in known)
    problems += [
        f"{manifest.folder / name}: the manifest does not name this shard" for name in stray
    ]
    return Verdict(manifest.folder, len(manifest.shards), sum(keys.values()), tuple(problems))


def _run(manifest: Manifest, workers: int) -> Iterator[_Seen]:
    tasks = [(manifest.folder, info) for info in manifest.shards]
    if workers == 1 or len(tasks) < 2:
        yield from map(_look, tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=context) as pool:
        yield from pool.map(_look, tasks)


def _look(task: tuple[Path, ShardInfo]) -> _Seen:
    folder, info = task
    seen = _Seen(info)
    path = folder / info.name
    if not path.exists():
        seen.problems.append(f"{path}: the shard is missing")
        return seen
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != info.sha256:
            seen.problems.append(f"{path}: its bytes are not those that were written (SHA-256)")
    try:
        index = build_index(path)
    except DataError as error:
        seen.problems.append(str(error))
        return seen
    try:
        if not np.array_equal(read_index(folder, info.name), index):
            seen.problems.append(f"{path}: its index does not match it")
    except DataError:
        seen.problems.append(f"{path}: its index is missing or damaged")
    if len(index) != info.samples:
        seen.problems.append(f"{path}: {len(index)} samples, but the manifest says {info.samples}")
    with path.open("rb") as file:
        for row in index:
            _look_at_sample(seen, path, row, file)
    return seen


def _look_at_sample(seen: _Seen, path: Path, row: np.void, file: Any) -> None:
    """Decode the image and hold the JSON against the allow-list."""
    key = row["key"].decode()
    seen.keys.append(key)
    file.seek(row["image_offset"])
    try:
        decode_image(file.read(row["image_size"]))
    except DataError as error:
        seen.problems.append(f"{path}: {key}: {error}")
    file.seek(row["json_offset"])
    try:
        known = json.loads(file.read(row["json_size"]))
        extra = sorted(set(known) - set(ALLOWED_KEYS))
        if extra:
            seen.problems.append(f"{path}: {key}: {', '.join(extra)} may not be in a shard")
        seen.patients.add((known["source"], known["patient"]))
    except (ValueError, KeyError, TypeError):
        seen.problems.append(f"{path}: {key}: its JSON is damaged")
