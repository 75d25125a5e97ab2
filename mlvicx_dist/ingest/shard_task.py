"""One shard: from its records and the settings to its bytes and a note of what is in it.

This is what a Ray task runs; it depends on its task alone, so that any node gives the same bytes.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, BinaryIO, Literal

from mlvicx_dist.ingest.dicom_header import Rules
from mlvicx_dist.ingest.masks import decode_runs, stored_mask
from mlvicx_dist.ingest.pixels import Format, Stored, store
from mlvicx_dist.ingest.record import Record, patient_key, sample_json, sample_key
from mlvicx_dist.ingest.refused import Refused
from mlvicx_dist.ingest.shards import write_shard
from mlvicx_dist.ingest.splits import Fractions
from mlvicx_dist.storage import Place, is_local, place, reaching, read_bytes

COPY = "near-duplicate"
"""The code of an image that is left out as a copy of another."""
MAX_FILE_BYTES = 512 * 2**20
"""A larger file is no radiograph."""
NearDuplicates = Literal["error", "drop", "allow"]


@dataclass(frozen=True)
class PackSettings:
    """What decides the bytes of the shards.

    Attributes:
        short_side_px: Of the stored images.
        format: JPEG, or PNG of 8 or 16 bits.
        quality: Of JPEG.
        samples_per_shard: None: by the number of images, at most 2048.
        fractions: Parts of the patients in train, val and test.
        official_splits: Whether a record's own split is kept.
        smallest_side_px: An image with a shorter side is refused.
        near_duplicates: Copies of one image in two splits stop the packing, or the one in the
            earlier split (train before val before test) is left out, or they stay.
        rules: What a DICOM file must keep.
    """

    short_side_px: int = 256
    format: Format = "jpeg"
    quality: int = 95
    samples_per_shard: int | None = None
    fractions: Fractions = field(default_factory=Fractions)
    official_splits: bool = True
    smallest_side_px: int = 32
    near_duplicates: NearDuplicates = "error"
    rules: Rules = field(default_factory=Rules)


@dataclass(frozen=True)
class ShardTask:
    """Everything that one shard is made of."""

    out: Place
    name: str
    split: str
    records: tuple[Record, ...]
    classes: tuple[str, ...]
    settings: PackSettings
    salt: bytes
    dropped: frozenset[str] = frozenset()
    """Keys of images that are left out as copies of others."""


def pack_shard(task: ShardTask) -> dict[str, Any]:
    """Write one shard.

    Returns:
        A note, as JSON values: `shard` (its `ShardInfo`), `sources`, `bytes_read`, `hashes` (key
        and perceptual hash of each image), `dropped` keys, and `refused` (key, code, detail and the
        file's stamp).
    """
    note: dict[str, Any] = {
        "sources": Counter(),
        "refused": [],
        "dropped": [],
        "hashes": [],
        "bytes_read": 0,
    }
    info = write_shard(task.out / task.name, _samples(task, note), split=task.split)
    return {"shard": asdict(info), **note}


def _samples(task: ShardTask, note: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for record in task.records:
        key = sample_key(task.salt, record.source, record.image_id)
        try:
            if key in task.dropped:
                note["dropped"].append(key)
                raise Refused(COPY, "a copy of it is in a later split")
            sample, phash, size = _sample(task, record)
        except Refused as refusal:
            stamp = file_stamp(record.path)
            note["refused"].append((key, refusal.code, refusal.detail, stamp))
            continue
        note["sources"][record.source] += 1
        note["hashes"].append((key, phash))
        note["bytes_read"] += size
        yield {"__key__": key, **sample}


def _sample(task: ShardTask, record: Record) -> tuple[dict[str, bytes], str, int]:
    """The members of a sample, its perceptual hash, and how many bytes were read for it.

    Raises:
        Refused: the file cannot be read, or is no frontal chest radiograph.
    """
    settings = task.settings
    with _opened(record.path) as file:
        image = store(
            file,
            short_side_px=settings.short_side_px,
            format=settings.format,
            quality=settings.quality,
            smallest_side_px=settings.smallest_side_px,
            rules=settings.rules,
        )
        size = file.seek(0, io.SEEK_END)
    if image.header:
        record = replace(
            record,
            view=record.view or image.header.view,
            sex=record.sex or image.header.sex,
            age=image.header.age if record.age is None else record.age,
        )
    description = sample_json(
        record,
        patient=patient_key(task.salt, record.source, record.patient_id),
        split=task.split,
        classes=task.classes,
        scale=image.scale,
        phash=image.phash,
    )
    members = {image.suffix: image.data, "json": json.dumps(description, sort_keys=True).encode()}
    if record.mask is not None:
        members["mask.png"] = _mask(record, image)
    return members, image.phash, size


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    """A source file, open; one of a store is fetched whole.

    Raises:
        Refused: it is not there, is too large, or cannot be read.
    """
    where = place(path)
    try:
        # http takes every failure for a file that is missing: to read it tells the two apart.
        with suppress(FileNotFoundError), reaching(where):
            if where.stat().st_size > MAX_FILE_BYTES:
                raise Refused("size", f"more than {MAX_FILE_BYTES:,} bytes")
        with where.open("rb") if is_local(where) else io.BytesIO(read_bytes(where)) as file:
            yield file
    except FileNotFoundError:
        raise Refused("missing", "the file is gone") from None
    except OSError as error:
        raise Refused("unreachable", error.strerror or str(error)) from None


def file_stamp(path: str) -> str:
    """Size and time of a file, by which it is seen that it was mended; empty where it is not."""
    where = place(path)
    try:
        with reaching(where):
            known = where.stat()
            return f"{known.st_size} {getattr(known, 'st_mtime_ns', 0) or known.st_mtime}"
    except OSError:
        return ""


def _mask(record: Record, image: Stored) -> bytes:
    assert record.mask is not None
    mask = decode_runs(record.mask)
    if mask.shape[::-1] != image.original:
        height, width = mask.shape
        raise Refused(
            "mask-size",
            f"the mask is {width} x {height}, the image {image.original[0]} x {image.original[1]}",
        )
    return stored_mask(mask, image.size)
