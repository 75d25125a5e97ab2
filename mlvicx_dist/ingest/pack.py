"""Records to shards: in parallel, resumable, and the same bytes whatever the number of workers.

The plan orders records by key, which mixes patients and classes, and cuts each split into shards.
A shard's content is a pure function of its records and the settings. A finished shard leaves a note
in `.packing/`, so a second start goes on where a killed one stopped; the manifest comes last. A
folder that is whole but for some shards is mended by the same call: it packs these alone.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import mlvicx_dist
from mlvicx_dist.errors import DataError, TooManyRefusedError
from mlvicx_dist.ingest import leaks
from mlvicx_dist.ingest.record import Record, salt_digest, sample_key
from mlvicx_dist.ingest.shard_task import COPY, PackSettings, ShardTask, file_stamp, pack_shard
from mlvicx_dist.ingest.shards import (
    CONTROL,
    MANIFEST,
    Manifest,
    ShardInfo,
    index_path,
    read_manifest,
    restore_index,
    write_manifest,
)
from mlvicx_dist.ingest.splits import assign
from mlvicx_dist.progress import Progress
from mlvicx_dist.session import in_parallel
from mlvicx_dist.storage import Place, is_local, place, reaching, told, write_whole

NOTES = ".packing"
MOST_SAMPLES, FEWEST_SAMPLES, SHARDS = 2048, 64, 16
"""A shard holds at most so many samples, and of a small set so few that there are 16 shards."""
Refusal = tuple[str, str, str]
"""Path, code and detail of a file that is left out."""


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
    out: str | Path,
    *,
    settings: PackSettings,
    salt: bytes,
    workers: int | None = 1,
    max_refused: float = 0.05,
    progress: Progress | None = None,
) -> PackReport:
    """Pack images into the folder `out`.

    Args:
        records: The images; each (source, image_id) once.
        out: The folder of the shards, local or remote.
        settings: What decides their bytes.
        salt: The owner's salt.
        workers: Ray tasks at once; None: as many as there are cores. 1 needs no Ray.
        max_refused: The largest part of the files that may be left out.
        progress: Counts images.

    Raises:
        DataError: nothing to pack, another packing in the folder, copies of one image in two
            splits, no space, no rights.
        TooManyRefusedError: more files than `max_refused` cannot be read; no manifest is written.
    """
    folder = place(out)
    tasks = plan(records, folder, settings=settings, salt=salt)
    digest = _digest(tasks)
    # Notes hold keys: paths, which may name patients, stay out of the folder.
    paths = {sample_key(salt, record.source, record.image_id): record.path for record in records}
    try:
        with reaching(folder):
            if (folder / MANIFEST).exists():
                return _mended(tasks, digest, workers, progress)
            notes = _open_notes(folder, digest)
            done = {task.name: note for task in tasks if (note := _note(notes, task, paths))}
            if progress:
                progress.skip(sum(len(task.records) for task in tasks if task.name in done))
            todo = [task for task in tasks if task.name not in done]
            _pack_all(todo, done, notes, workers, progress)
            _leave_out_copies(tasks, done, notes, paths, workers)
            refused = tuple(
                (paths[key], code, detail)
                for task in tasks
                for key, code, detail, _ in done[task.name]["refused"]
            )
            _write_refused(report_path(folder, "refused"), refused)
            _check_refused(folder, refused, len(records), max_refused)
            _clear(folder)
            write_manifest(_manifest(tasks, done, digest))
            _remove(notes)
    except OSError as error:
        raise DataError(
            f"{out}: packing stopped ({told(error)}); make room or mend the folder's "
            "rights and run the same command again: finished shards are kept."
        ) from None
    return PackReport(read_manifest(folder), refused, len(todo), len(tasks) - len(todo))


def plan(
    records: Sequence[Record], out: Place, *, settings: PackSettings, salt: bytes
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
    names = dict.fromkeys((*classes, *(record.source for record in records)))
    wrong = next((name for name in names if CONTROL.search(name)), None)
    if wrong is not None:
        raise DataError(
            f"{out}: the class or source {wrong!r} holds an end of line or another control "
            "character; mend it in the table, or give --name."
        )
    members: dict[str, list[Record]] = defaultdict(list)
    for split, _, record in keyed:
        members[split].append(record)
    most = settings.samples_per_shard or min(
        MOST_SAMPLES, max(FEWEST_SAMPLES, -(-len(records) // SHARDS))
    )
    return [
        ShardTask(out, f"{split}-{number:06d}.tar", split, tuple(part), classes, settings, salt)
        for split, chosen in members.items()
        for number, part in enumerate(chosen[i : i + most] for i in range(0, len(chosen), most))
    ]


def report_path(out: Place, kind: str) -> Path:
    """Where a report on a packing stands: beside its folder, on this machine.

    Reports hold paths, which may name patients: they never travel with the shards.
    """
    parent = out.parent if is_local(out) else Path.cwd()
    return Path(parent / f"{out.name}.{kind}.csv")


def _pack_all(
    tasks: Sequence[ShardTask],
    done: dict[str, dict[str, Any]],
    notes: Place,
    workers: int | None,
    progress: Progress | None,
) -> None:
    """Pack shards and keep their notes."""
    read = 0
    for task, note in in_parallel(pack_shard, tasks, workers=workers):
        if not (task.out / task.name).exists():
            raise DataError(
                f"{task.out}: a worker on another node wrote {task.name}, but it is not here: the "
                "folder is not shared; choose an --out that all nodes see."
            )
        done[task.name] = note
        write_whole(notes / f"{task.name}.json", json.dumps(note).encode())
        read += note["bytes_read"]
        if progress:
            progress.advance(len(task.records), f"{read / 1e6 / progress.elapsed_s:.3g} MB/s read")


def _leave_out_copies(
    tasks: Sequence[ShardTask],
    done: dict[str, dict[str, Any]],
    notes: Place,
    paths: Mapping[str, str],
    workers: int | None,
) -> None:
    """Look for copies of one image in two splits, and pack again without them where asked.

    Raises:
        DataError: there are copies, and they are neither dropped nor allowed.
    """
    out, settings = tasks[0].out, tasks[0].settings
    if settings.near_duplicates == "allow":
        return
    found = leaks.find_leaks(
        [
            leaks.Hashed(key, task.split, phash, where=paths[key])
            for task in tasks
            for key, phash in done[task.name]["hashes"]
        ]
    )
    if not found:
        return
    report = report_path(out, "leaks")
    write_whole(report, leaks.as_csv(found), mode=0o600)
    if settings.near_duplicates == "error":
        raise DataError(
            f"{out}: {len(found)} pairs of images in different splits are copies of one "
            f"({leaks.words(found)}); look at {report}, then leave out the earlier of each with "
            "--near-duplicates drop, or keep them with --near-duplicates allow."
        )
    dropped = frozenset(leak.first.key for leak in found)
    again = [
        # What an earlier start left out has no hash here, and stays out.
        replace(task, dropped=dropped | frozenset(done[task.name]["dropped"]))
        for task in tasks
        if dropped & {key for key, _ in done[task.name]["hashes"]}
    ]
    _pack_all(again, done, notes, workers, None)


def _digest(tasks: Sequence[ShardTask]) -> str:
    """What is packed and how; not where from, so that a source may be mounted elsewhere."""
    settings = {**asdict(tasks[0].settings), "near_duplicates": None}
    sha = hashlib.sha256(f"{mlvicx_dist.__version__}{settings}{tasks[0].classes}".encode())
    sha.update(salt_digest(tasks[0].salt).encode())
    names = [f.name for f in fields(Record) if f.name != "path"]
    for task in tasks:
        sha.update(task.name.encode())
        for record in task.records:
            sha.update(repr([getattr(record, name) for name in names]).encode())
    return sha.hexdigest()


def _mended(
    tasks: Sequence[ShardTask], digest: str, workers: int | None, progress: Progress | None
) -> PackReport:
    """The report of a packing that was ended before; shards that are gone are packed again.

    Raises:
        DataError: the folder holds another packing, or a source file has changed.
    """
    manifest = read_manifest(tasks[0].out)
    if manifest.version != mlvicx_dist.__version__:
        raise DataError(
            f"{manifest.folder}: mlvicx_dist {manifest.version} packed this, and this is "
            f"{mlvicx_dist.__version__}, whose shards may be others; choose another --out."
        )
    if manifest.settings.get("plan") != digest:
        raise DataError(
            f"{manifest.folder}: other images, settings or another salt were packed there; "
            "choose another --out."
        )
    mode = tasks[0].settings.near_duplicates
    if mode != "allow" and manifest.settings.get("near_duplicates") == "allow":
        raise DataError(
            f"{manifest.folder}: this was packed with --near-duplicates allow, so it may hold "
            f"copies of one image in two splits; to pack with {mode} choose another --out."
        )
    infos = {shard.name: shard for shard in manifest.shards}
    dropped = frozenset(manifest.settings["dropped"])
    gone = []
    for task in tasks:
        info, path = infos[task.name], task.out / task.name
        if not path.exists() or path.stat().st_size != info.bytes:
            gone.append(replace(task, dropped=dropped))
        elif not index_path(path).exists():
            restore_index(path, info)
    if progress:
        progress.skip(sum(len(task.records) for task in tasks) - sum(len(t.records) for t in gone))
    for task, note in in_parallel(pack_shard, gone, workers=workers):
        if note["shard"]["sha256"] != infos[task.name].sha256:
            (task.out / task.name).unlink()
            raise DataError(
                f"{task.out / task.name}: packed again it is not what it was, so a file of the "
                "source or a library has changed; pack into another --out."
            )
        if progress:
            progress.advance(len(task.records))
    if (task.out / NOTES).exists():
        _remove(task.out / NOTES)
    kept = len(tasks) - len(gone)
    return PackReport(manifest, (), len(gone), kept, already_packed=not gone)


def _there(folder: Place, info: ShardInfo) -> bool:
    """Whether a shard and its index are there, the shard of the right size."""
    shard = folder / info.name
    return bool(
        shard.exists() and shard.stat().st_size == info.bytes and index_path(shard).exists()
    )


def _open_notes(out: Place, digest: str) -> Place:
    notes = out / NOTES
    notes.mkdir(parents=True, exist_ok=True)
    plan_file = notes / "plan"
    if plan_file.exists() and plan_file.read_text() != digest:
        raise DataError(
            f"{out}: a packing of other images, settings, another salt or version was begun there; "
            f"finish that one, remove {out}, or choose another --out."
        )
    write_whole(plan_file, digest.encode())
    _clear(out)
    return notes


def _clear(out: Place) -> None:
    """Remove what killed workers left half-written."""
    for leftover in out.glob(".*.partial") if is_local(out) else ():
        leftover.unlink(missing_ok=True)


def _note(notes: Place, task: ShardTask, paths: Mapping[str, str]) -> dict[str, Any] | None:
    """The note of a finished shard, if the shard is what was written and would be so again.

    It would not where a refused file has been mended, or copies were dropped that may now stay.
    """
    path = task.out / task.name
    try:
        note: dict[str, Any] = json.loads((notes / f"{task.name}.json").read_text())
        info = ShardInfo(**note["shard"])
        if not _there(task.out, info):
            return None
        if is_local(path):  # an object of a store was put whole
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != info.sha256:
                    return None
        if note["dropped"] and task.settings.near_duplicates != "drop":
            return None
        mended = any(
            code == "unreachable" or (code != COPY and file_stamp(paths[key]) != stamp)
            for key, code, _, stamp in note["refused"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None if mended else note


def _manifest(tasks: Sequence[ShardTask], done: dict[str, dict[str, Any]], digest: str) -> Manifest:
    shards = tuple(ShardInfo(**done[task.name]["shard"]) for task in tasks)
    splits: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    for shard in shards:
        splits[shard.split] += shard.samples
        sources.update(done[shard.name]["sources"])
    dropped = sorted(key for task in tasks for key in done[task.name]["dropped"])
    task = tasks[0]
    return Manifest(
        folder=task.out,
        shards=shards,
        classes=task.classes,
        splits=dict(splits),
        sources=dict(sources),
        settings={**asdict(task.settings), "plan": digest, "dropped": dropped},
        salt_digest=salt_digest(task.salt),
        version=mlvicx_dist.__version__,
    )


def _check_refused(out: Place, refused: Sequence[Refusal], count: int, max_refused: float) -> None:
    unusable = [code for _, code, _ in refused if code != COPY]
    if len(unusable) > max_refused * count:
        counts = Counter(unusable).most_common(4)
        raise TooManyRefusedError(
            f"{out}: {len(unusable)} of {count} files cannot be packed "
            f"({', '.join(f'{code} {n}' for code, n in counts)}); see "
            f"{report_path(out, 'refused')}, and mend them or allow more with --max-refused."
        )


def _write_refused(path: Path, refused: Sequence[Refusal]) -> None:
    """The owner's list of what was left out: it holds paths, so only the owner may read it."""
    buffer = io.StringIO()
    csv.writer(buffer).writerows([("path", "reason", "detail"), *refused])
    write_whole(path, buffer.getvalue().encode("utf-8", "surrogateescape"), mode=0o600)


def _remove(notes: Place) -> None:
    for path in list(notes.iterdir()):
        path.unlink()
    if is_local(notes):
        notes.rmdir()
