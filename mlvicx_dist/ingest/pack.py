"""Records to shards: in parallel, resumable, and the same bytes whatever the number of workers.

The plan orders records by key, which mixes patients and classes, and cuts each split into shards.
A shard's content is a pure function of its records and the settings. A finished shard leaves a note
in `.packing/`, so a second start goes on where a killed one stopped; the manifest comes last.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import multiprocessing
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlvicx_dist
from mlvicx_dist.errors import DataError, TooManyRefusedError
from mlvicx_dist.ingest.pixels import Format, store
from mlvicx_dist.ingest.record import Record, patient_key, salt_digest, sample_json, sample_key
from mlvicx_dist.ingest.refused import Refused
from mlvicx_dist.ingest.shards import (
    MANIFEST,
    Manifest,
    ShardInfo,
    read_manifest,
    write_manifest,
    write_shard,
    write_whole,
)
from mlvicx_dist.ingest.splits import Fractions, assign
from mlvicx_dist.progress import Progress

log = logging.getLogger(__name__)

NOTES = ".packing"
REFUSED = "refused.csv"
Refusal = tuple[str, str, str]
"""Path, code and detail of a file that is left out."""


@dataclass(frozen=True)
class PackSettings:
    """What decides the bytes of the shards."""

    short_side_px: int = 256
    format: Format = "jpeg"
    quality: int = 95
    samples_per_shard: int = 2048
    fractions: Fractions = field(default_factory=Fractions)
    official_splits: bool = True


@dataclass(frozen=True)
class ShardTask:
    """Everything that one shard is made of."""

    out: Path
    name: str
    split: str
    records: tuple[Record, ...]
    classes: tuple[str, ...]
    settings: PackSettings
    salt: bytes


@dataclass(frozen=True)
class PackReport:
    """What a packing did."""

    manifest: Manifest
    refused: tuple[Refusal, ...]
    written: int
    kept: int
    already_packed: bool = False

    def reasons(self) -> dict[str, int]:
        """How many files were left out, by reason."""
        return dict(Counter(code for _, code, _ in self.refused).most_common())


def pack(
    records: Sequence[Record],
    out: Path,
    *,
    settings: PackSettings,
    salt: bytes,
    workers: int = 1,
    max_refused: float = 0.05,
    progress: Progress | None = None,
) -> PackReport:
    """Pack images into the folder `out`.

    Args:
        records: The images; each (source, image_id) once.
        out: The folder of the shards.
        settings: What decides their bytes.
        salt: The owner's salt.
        workers: Processes.
        max_refused: The largest part of the files that may be left out.
        progress: Counts images.

    Raises:
        DataError: nothing to pack, another packing in the folder, no space, no rights.
        TooManyRefusedError: more files than `max_refused` cannot be read; no manifest is written.
    """
    tasks = plan(records, out, settings=settings, salt=salt)
    digest = _digest(tasks)
    try:
        finished = _finished(out, digest)
        if finished:
            return finished
        notes = _open_notes(out, digest)
        done = {task.name: note for task in tasks if (note := _note(notes, task))}
        if progress:
            progress.skip(sum(len(task.records) for task in tasks if task.name in done))
        todo = [task for task in tasks if task.name not in done]
        for task, note in _run(todo, workers):
            done[task.name] = note
            write_whole(notes / f"{task.name}.json", json.dumps(note).encode())
            if progress:
                progress.advance(len(task.records))
        refused = tuple(tuple(row) for task in tasks for row in done[task.name]["refused"])
        _write_refused(out / REFUSED, refused)
        if len(refused) > max_refused * len(records):
            raise TooManyRefusedError(
                f"{out}: {len(refused)} of {len(records)} files cannot be packed "
                f"({_words(refused)}); see {out / REFUSED}, and mend them or allow more with "
                "--max-refused."
            )
        manifest = _manifest(tasks, done, digest)
        write_manifest(manifest)
        shutil.rmtree(notes)
    except OSError as error:
        raise DataError(
            f"{out}: packing stopped ({error.strerror}); make room or mend the folder's rights and "
            "run the same command again: finished shards are kept."
        ) from None
    return PackReport(read_manifest(out), refused, len(todo), len(tasks) - len(todo))


def plan(
    records: Sequence[Record], out: Path, *, settings: PackSettings, salt: bytes
) -> list[ShardTask]:
    """Which record goes into which shard: by split, in the order of the keys."""
    if not records:
        raise DataError(f"{out}: there are no images to pack; check --source.")
    splits = assign(
        records, salt=salt, fractions=settings.fractions, official=settings.official_splits
    )
    keys = [sample_key(salt, record.source, record.image_id) for record in records]
    keyed = sorted(zip(splits, keys, records, strict=True), key=lambda item: item[:2])
    if len(set(keys)) < len(keys):
        raise DataError(f"{out}: an image is listed twice; remove the repetition from the source.")
    classes = tuple(dict.fromkeys(name for record in records for name in record.labels))
    tasks = []
    for split in dict.fromkeys(split for split, _, _ in keyed):
        members = [record for s, _, record in keyed if s == split]
        for number, start in enumerate(range(0, len(members), settings.samples_per_shard)):
            part = tuple(members[start : start + settings.samples_per_shard])
            name = f"{split}-{number:06d}.tar"
            tasks.append(ShardTask(out, name, split, part, classes, settings, salt))
    return tasks


def pack_shard(task: ShardTask) -> dict[str, Any]:
    """Write one shard; the note of what is in it. A later scheduler runs just this elsewhere."""
    refused: list[Refusal] = []
    sources: Counter[str] = Counter()
    path = task.out / task.name
    count = write_shard(path, _samples(task, refused, sources))
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    info = ShardInfo(task.name, task.split, count, path.stat().st_size, sha256)
    return {"shard": asdict(info), "sources": sources, "refused": refused}


def _samples(
    task: ShardTask, refused: list[Refusal], sources: Counter[str]
) -> Iterator[dict[str, Any]]:
    settings = task.settings
    for record in task.records:
        try:
            image = store(
                record.path,
                short_side_px=settings.short_side_px,
                format=settings.format,
                quality=settings.quality,
            )
        except Refused as refusal:
            refused.append((str(record.path), refusal.code, refusal.detail))
            continue
        description = sample_json(
            record,
            patient=patient_key(task.salt, record.source, record.patient_id),
            split=task.split,
            classes=task.classes,
            scale=image.scale,
            phash=image.phash,
        )
        sources[record.source] += 1
        yield {
            "__key__": sample_key(task.salt, record.source, record.image_id),
            image.suffix: image.data,
            "json": json.dumps(description, sort_keys=True).encode(),
        }


def _run(tasks: Sequence[ShardTask], workers: int) -> Iterator[tuple[ShardTask, dict[str, Any]]]:
    if workers == 1 or len(tasks) < 2:
        for task in tasks:
            yield task, pack_shard(task)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=context) as pool:
        futures = {pool.submit(pack_shard, task): task for task in tasks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _digest(tasks: Sequence[ShardTask]) -> str:
    """What is packed and how; not where from, so that a source may be mounted elsewhere."""
    sha = hashlib.sha256(mlvicx_dist.__version__.encode())
    for task in tasks:
        sha.update(f"{task.name}{task.settings}{task.classes}{salt_digest(task.salt)}".encode())
        for record in task.records:
            fields = {**vars(record), "path": record.path.name}
            sha.update(repr(fields).encode())
    return sha.hexdigest()


def _finished(out: Path, digest: str) -> PackReport | None:
    """The report of a packing that was ended before, where it is the same one."""
    if not (out / MANIFEST).exists():
        return None
    manifest = read_manifest(out)
    if manifest.settings.get("plan") != digest:
        raise DataError(
            f"{out}: other images, settings or another salt were packed there; "
            "choose another --out."
        )
    with (out / REFUSED).open(encoding="utf-8", newline="") as file:
        refused = tuple(tuple(row) for row in csv.reader(file))[1:]
    return PackReport(manifest, refused, 0, len(manifest.shards), already_packed=True)  # type: ignore[arg-type]


def _open_notes(out: Path, digest: str) -> Path:
    notes = out / NOTES
    notes.mkdir(parents=True, exist_ok=True)
    plan_file = notes / "plan"
    if plan_file.exists() and plan_file.read_text() != digest:
        raise DataError(
            f"{out}: a packing of other images, settings or another salt was begun there; "
            f"finish that one, remove {out}, or choose another --out."
        )
    write_whole(plan_file, digest.encode())
    for leftover in out.glob(".*.partial"):
        leftover.unlink()
    return notes


def _note(notes: Path, task: ShardTask) -> dict[str, Any] | None:
    """The note of a finished shard whose bytes are still those that were written."""
    try:
        note: dict[str, Any] = json.loads((notes / f"{task.name}.json").read_text())
        with (task.out / task.name).open("rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == note["shard"]["sha256"]
    except (OSError, ValueError, KeyError):
        return None
    return note if same else None


def _manifest(tasks: Sequence[ShardTask], done: dict[str, dict[str, Any]], digest: str) -> Manifest:
    shards = tuple(ShardInfo(**done[task.name]["shard"]) for task in tasks)
    splits: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    for shard in shards:
        splits[shard.split] += shard.samples
        sources.update(done[shard.name]["sources"])
    task = tasks[0]
    return Manifest(
        folder=task.out,
        shards=shards,
        classes=task.classes,
        splits=dict(splits),
        sources=dict(sources),
        settings={**asdict(task.settings), "plan": digest},
        salt_digest=salt_digest(task.salt),
        version=mlvicx_dist.__version__,
    )


def _write_refused(path: Path, refused: Sequence[Refusal]) -> None:
    """The owner's list of what was left out: it holds paths, so only the owner may read it."""
    buffer = io.StringIO()
    csv.writer(buffer).writerows([("path", "reason", "detail"), *refused])
    write_whole(path, buffer.getvalue().encode(), mode=0o600)


def _words(refused: Sequence[Refusal]) -> str:
    counts = Counter(code for _, code, _ in refused)
    return ", ".join(f"{code} {count}" for code, count in counts.most_common(4))
