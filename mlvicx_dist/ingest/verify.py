"""Is a shard folder what its manifest says, and is nothing of a patient in it?

Every digest, index, label, image and mask is looked at; what stands in a member is held against
what may stand there (DESIGN 5), value by value.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlvicx_dist.errors import DataError
from mlvicx_dist.ingest.leaks import Hashed, Leak, apart, find_leaks, hashed, torn_patients
from mlvicx_dist.ingest.record import ALLOWED_KEYS, OLDEST_AGE, VIEWS
from mlvicx_dist.ingest.shards import (
    MANIFEST,
    Manifest,
    ShardInfo,
    build_index,
    decode_image,
    read_index,
    read_manifest,
)
from mlvicx_dist.progress import Progress
from mlvicx_dist.session import in_parallel
from mlvicx_dist.storage import Place, is_local, listed, place, reaching, read_bytes, told

HEX32, HEX64 = re.compile(r"[0-9a-f]{32}"), re.compile(r"[0-9a-f]{64}")
SIDES = {"label", "left", "top", "right", "bottom"}
JFIF_BYTES = 16
PLAIN_PARTS = {
    "FFE0",
    "FFDB",
    "FFC0",
    "FFC1",
    "FFC2",
    "FFC4",
    "FFDA",
    "FFDD",
    "IHDR",
    "IDAT",
    "IEND",
}
"""Segments and chunks of a JPEG and a PNG that hold pixels and how to decode them."""


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a shard folder, and how it is mended."""

    folder: Place
    shards: int
    samples: int
    problems: tuple[str, ...]
    leaks: tuple[Leak, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def repair(self) -> str:
        """The way back to a whole folder."""
        return (
            "remove the shards named above and run the same sharding command again: it packs these "
            "alone, to the same bytes"
        )

    def document(self) -> dict[str, Any]:
        """The verdict as JSON values."""
        return {
            "folder": str(self.folder),
            "shards": self.shards,
            "samples": self.samples,
            "problems": list(self.problems),
            "notes": list(self.notes),
            "leaks": [
                {"bits": leak.bits, "first": _named(leak.first), "second": _named(leak.second)}
                for leak in self.leaks
            ],
        }

    def lines(self) -> list[str]:
        """The verdict in words."""
        lines = [*self.notes, *self.problems]
        if self.problems:
            lines.append(f"{len(self.problems)} problems; to mend a damaged shard, {self.repair}.")
        else:
            lines.append(f"{self.folder}: {self.samples} samples in {self.shards} shards, whole.")
        for leak in self.leaks[:20]:
            lines.append(
                f"{leak.first.where} {leak.first.split} {leak.first.key} is a copy of "
                f"{leak.second.where} {leak.second.split} {leak.second.key} ({leak.bits} bits)"
            )
        if self.leaks:
            lines.append(
                f"{len(self.leaks)} pairs are copies of one image in two splits (--json lists "
                "all): what was learned on one is no test on the other."
            )
        return lines


def _named(image: Hashed) -> dict[str, str]:
    return {"folder": image.where, "split": image.split, "key": image.key}


@dataclass
class _Seen:
    """What one shard holds."""

    info: ShardInfo
    problems: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)


def verify(
    folder: str,
    *,
    against: Sequence[str] = (),
    workers: int | None = 1,
    progress: Progress | None = None,
) -> Verdict:
    """Check a shard folder against its manifest.

    Args:
        folder: The folder or its URL.
        against: Other shard folders; copies of one image in different splits of all are leaks.
        workers: Ray tasks at once; None: as many as there are cores.
        progress: Counts samples.

    Raises:
        DataError: there is no manifest to check against.
    """
    manifest = read_manifest(folder)
    others = [read_manifest(other) for other in against]
    problems: dict[str, list[str]] = {}
    keys: Counter[str] = Counter()
    tasks = [_Task(manifest, info) for info in manifest.shards]
    for _, seen in in_parallel(_look, tasks, workers=workers):
        problems[seen.info.name] = seen.problems
        keys.update(seen.keys)
        if progress:
            progress.advance(seen.info.samples)
    found = [problem for name in sorted(problems) for problem in problems[name]]
    twice = sum(count > 1 for count in keys.values())
    if twice:
        found.append(f"{manifest.folder}: {twice} keys stand in more than one place")
    totals = Counter[str]()
    for shard in manifest.shards:
        totals[shard.split] += shard.samples
    if dict(totals) != dict(manifest.splits):
        found.append(f"{manifest.folder / MANIFEST}: the split counts do not add up")
    strays, notes = _strays(manifest)
    found += strays
    leaks: list[Leak] = []
    if not found:
        images = [one for each in (manifest, *others) for one in hashed(each)]
        leaks = find_leaks(images)
        found += _torn(images, [manifest, *others], manifest.salt_digest)
    return Verdict(
        folder=manifest.folder,
        shards=len(manifest.shards),
        samples=sum(keys.values()),
        problems=tuple(found),
        leaks=tuple(leaks),
        notes=(
            *notes,
            *(
                f"{other.folder}: packed {why}, so only its images can be compared, not its "
                "patients."
                for other in others
                if (why := apart(manifest, other))
            ),
        ),
    )


def _strays(manifest: Manifest) -> tuple[list[str], list[str]]:
    """Shards that the manifest does not name, or a note that they cannot be looked for."""
    folder, known = manifest.folder, {shard.name for shard in manifest.shards}
    names, why = [], "its manifest is there, but in no list"
    try:
        names = sorted(path.name for path in listed(folder))
    except OSError as error:
        why = told(error)
    if MANIFEST not in names:
        return [], [
            f"{folder}: it cannot be listed ({why}), so shards that the manifest does not name "
            "were not looked for."
        ]
    strays = [name for name in names if name.endswith(".tar") and name not in known]
    return [f"{folder / name}: the manifest does not name this shard" for name in strays], []


def _torn(images: Sequence[Hashed], manifests: Sequence[Manifest], salt_digest: str) -> list[str]:
    """Patients who are in two splits of the folders that share a salt."""
    folders = sorted({str(m.folder) for m in manifests if m.salt_digest == salt_digest})
    torn = torn_patients(image for image in images if image.where in folders)
    if not torn:
        return []
    return [
        f"{', '.join(folders)}: {torn} patients are in two splits; pack these folders together, or "
        "do not use them together"
    ]


@dataclass(frozen=True)
class _Task:
    """One shard to look at, and what may stand in it."""

    manifest: Manifest
    info: ShardInfo


def _look(task: _Task) -> _Seen:
    info = task.info
    folder = place(task.manifest.folder)
    seen = _Seen(info)
    path = folder / info.name
    try:
        with reaching(path):
            # A remote shard is read once, into memory.
            file = path.open("rb") if is_local(path) else io.BytesIO(read_bytes(path))
    except FileNotFoundError:
        seen.problems.append(f"{path}: the shard is missing")
        return seen
    except OSError as error:
        seen.problems.append(f"{path}: the shard cannot be read ({told(error)})")
        return seen
    with file:
        if hashlib.file_digest(file, "sha256").hexdigest() != info.sha256:
            seen.problems.append(f"{path}: its bytes are not those that were written (SHA-256)")
        file.seek(0)
        try:
            index = build_index(file, str(path))
        except DataError as error:
            seen.problems.append(str(error))
            return seen
        try:
            if not np.array_equal(read_index(folder, info), index):
                seen.problems.append(f"{path}: its index does not match it")
        except DataError:
            seen.problems.append(f"{path}: its index is missing or damaged")
        if len(index) != info.samples:
            seen.problems.append(
                f"{path}: {len(index)} samples, but the manifest says {info.samples}"
            )
        for row in index:
            _look_at_sample(seen, task.manifest, str(path), row, file)
    return seen


def _look_at_sample(seen: _Seen, manifest: Manifest, path: str, row: np.void, file: Any) -> None:
    """Decode the image and the mask, and hold the JSON against what is allowed."""
    key = row["key"].decode()
    seen.keys.append(key)

    def member(kind: str) -> bytes:
        file.seek(int(row[f"{kind}_offset"]))
        return bytes(file.read(int(row[f"{kind}_size"])))

    def problem(what: str) -> None:
        seen.problems.append(f"{path}: {key}: {what}")

    if not HEX32.fullmatch(key):
        problem("its key is not 32 hexadecimal digits")
    shapes = []
    for kind in ("image", "mask") if row["mask_size"] else ("image",):
        try:
            shapes.append(decode_image(member(kind)).shape)
        except DataError as error:
            problem(str(error))
            continue
        extra = beside_pixels(member(kind))
        if extra:
            problem(f"its {kind} carries {extra}, which may name a patient")
    if len(set(shapes)) > 1:
        problem("its mask is not of the size of its image")
    try:
        known = json.loads(member("json"), object_pairs_hook=_once)
        for what in not_allowed(known, seen.info.split, manifest):
            problem(f"{what} may not be in a shard")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        problem("its JSON is damaged")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys stand once."""
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def beside_pixels(image: bytes) -> str:
    """What an encoded image carries beside its pixels, in words; nothing where it is plain.

    Args:
        image: A JPEG or PNG that decodes.
    """
    try:
        kinds, end = _jpeg_parts(image) if image[:2] == b"\xff\xd8" else _png_parts(image)
    except (struct.error, IndexError, ValueError):
        return "parts that cannot be told"
    extra = sorted({kind for kind in kinds if kind not in PLAIN_PARTS})
    if end < len(image):
        extra.append(f"{len(image) - end} bytes after its end")
    return ", ".join(extra)


def _jpeg_parts(image: bytes) -> tuple[list[str], int]:
    """The names of a JPEG's segments, and where it ends."""
    place = 2
    kinds: list[str] = []
    while True:
        kind = image[place + 1]
        if kind == 0xD9:
            return kinds, place + 2
        size = int(struct.unpack(">H", image[place + 2 : place + 4])[0])
        # A JFIF header of another size than the plain one holds a thumbnail, or something else.
        plain = kind != 0xE0 or size == JFIF_BYTES
        kinds.append(f"FF{kind:02X}" if plain else f"FFE0 of {size} bytes")
        place += 2 + size
        while kind == 0xDA:
            # The pixels: up to the next marker that is neither an escaped FF nor a restart.
            place = image.index(b"\xff", place)
            if image[place + 1] != 0 and not 0xD0 <= image[place + 1] < 0xD8:
                break
            place += 2


def _png_parts(image: bytes) -> tuple[list[str], int]:
    """The names of a PNG's chunks, and where it ends."""
    place, kinds = 8, [""]
    while kinds[-1] != "IEND":
        size, kind = struct.unpack(">I4s", image[place : place + 8])
        kinds.append(kind.decode("latin-1"))
        place += 12 + size
    return kinds[1:], place


def not_allowed(known: dict[str, Any], split: str, manifest: Manifest) -> list[str]:
    """What the JSON of a sample says that it may not, in words."""
    wrong = [f"the key {key}" for key in sorted(set(known) - set(ALLOWED_KEYS))]
    for key, allowed in _ALLOWED.items():
        if not allowed(known[key]):
            wrong.append(f"this {key}")
    if known["split"] != split:
        wrong.append("another split than its shard's")
    if known["source"] not in manifest.sources:
        wrong.append("a source that the manifest does not name")
    labels = [*known["labels"], *(box["label"] for box in known["boxes"])]
    if not set(labels) <= set(manifest.classes):
        wrong.append("a class that the manifest does not name")
    return wrong


def _boxes(value: Any) -> bool:
    return isinstance(value, list) and all(
        set(box) == SIDES and all(isinstance(box[s], int | float) for s in SIDES - {"label"})
        for box in value
    )


_ALLOWED: dict[str, Callable[[Any], bool]] = {
    "source": lambda v: isinstance(v, str),
    "patient": lambda v: bool(HEX32.fullmatch(v)),
    "view": lambda v: v is None or v in VIEWS,
    "sex": lambda v: v in (None, "F", "M"),
    "age": lambda v: v is None or (isinstance(v, int) and 0 <= v <= OLDEST_AGE),
    "labels": lambda v: all(value in (None, 0, 1) for value in v.values()),
    "boxes": _boxes,
    "phash": lambda v: bool(HEX64.fullmatch(v)),
}
