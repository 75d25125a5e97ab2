"""The shard format (DESIGN 5): tar files, an index beside each, and one manifest, written last.

Any WebDataset reader takes the tars. The index, derived from the tar alone, lets a sample be read
by position; the manifest says that a folder is whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from webdataset import TarWriter

from mlvicx_dist.errors import DataError
from mlvicx_dist.ingest.grey_jpeg import decode_grey_jpeg
from mlvicx_dist.storage import Place, becoming, place, reaching, read_bytes, told, write_whole

FORMAT = 1
MANIFEST = "manifest.json"
MAX_PIXELS = 36_000_000
"""A larger image is taken for an attack on memory."""
IMAGE_SUFFIXES = ("jpg", "png")
NUMBERS = (
    "image_offset",
    "image_size",
    "json_offset",
    "json_size",
    "mask_offset",
    "mask_size",
)
OWNER = ("root", "root", 0, 0)
"""Of every member: user and group by name and number."""
KEY_LENGTH = 32
INDEX_DTYPE = np.dtype([("key", f"S{KEY_LENGTH}"), *((name, "<i8") for name in NUMBERS)])
"""One row a sample; the mask's numbers are 0 where there is none."""
NO_ARRAY = (ValueError, EOFError, MemoryError, SyntaxError, TypeError, OverflowError, TokenError)
"""What NumPy says of a damaged file of an array."""
SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.tar")
"""Both become parts of paths, here and in a cache."""
SHA256 = re.compile(r"[0-9a-f]{64}")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
"""What no name holds: ends of lines, and what a terminal would obey."""


@dataclass(frozen=True)
class ShardInfo:
    """A shard as the manifest lists it."""

    name: str
    split: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A folder of shards, whole; `folder` is a path, local or remote."""

    folder: Place
    shards: tuple[ShardInfo, ...]
    classes: tuple[str, ...]
    splits: Mapping[str, int]
    sources: Mapping[str, int]
    settings: Mapping[str, Any]
    salt_digest: str
    version: str
    digest: str = ""
    """SHA-256 of the manifest's bytes: what a run remembers of its data."""


def read_manifest(folder: str | Path, *, patience_s: float | None = None) -> Manifest:
    """The manifest of a shard folder.

    Args:
        folder: The folder or its URL.
        patience_s: How long a store that fails is asked again; None: three times in all.

    Raises:
        DataError: the folder is missing, not packed to the end, damaged or from a newer version.
    """
    there = place(folder)
    path = there / MANIFEST
    try:
        data = read_bytes(path, patience_s=patience_s)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(_absent(there)) from None
    except OSError as error:
        raise DataError(
            f"{folder}: it cannot be reached ({told(error)}); check the address and "
            "your access to it."
        ) from None
    try:
        tree = json.loads(data)
        if tree["format"] > FORMAT:
            raise DataError(
                f"{path}: it was written by a newer mlvicx_dist ({tree['version']}); "
                "install that version or a later one."
            )
        _check(tree, path)
        return Manifest(
            folder=there,
            shards=tuple(ShardInfo(**shard) for shard in tree["shards"]),
            classes=tuple(tree["classes"]),
            splits=tree["splits"],
            sources=tree["sources"],
            settings=tree["settings"],
            salt_digest=tree["salt_digest"],
            version=tree["version"],
            digest=hashlib.sha256(data).hexdigest(),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path}: the manifest is damaged ({type(error).__name__}); pack the folder again."
        ) from None


def _absent(folder: Place) -> str:
    """The sentence for a folder without a manifest."""
    with suppress(OSError), reaching(folder):
        if folder.is_dir():
            return (
                f"{folder}: there is no {MANIFEST} in it; if its packing was stopped, run the same "
                "sharding command again to finish it."
            )
    return f"{folder}: there is no such folder of shards; pack one with a script of sharding/."


def _check(tree: dict[str, Any], path: Place) -> None:
    """See that names and numbers of a manifest, which may come from anywhere, are such.

    Raises:
        DataError: a shard is no plain file beside it, or a name holds what is no text.
    """
    for shard in tree["shards"]:
        numbers = (shard["samples"], shard["bytes"])
        if not (SHARD_NAME.fullmatch(shard["name"]) and SHA256.fullmatch(shard["sha256"])):
            what = f"{shard['name']!r} with the SHA-256 {shard['sha256']!r} is no shard of it"
        elif not all(isinstance(number, int) and 0 <= number < 2**63 for number in numbers):
            what = f"{shard['name']} cannot have {numbers[0]!r} samples in {numbers[1]!r} bytes"
        else:
            continue
        raise DataError(f"{path}: {what}; use no shards from there, or pack the folder again.")
    for kind in ("splits", "sources", "settings"):
        if not isinstance(tree[kind], dict):
            raise TypeError(kind)
    words = [tree["version"], *tree["classes"], *tree["splits"], *tree["sources"]]
    words += [shard["split"] for shard in tree["shards"]]
    wrong = next((word for word in words if CONTROL.search(word)), None)
    if wrong is not None:
        raise DataError(f"{path}: the name {wrong!r} is no text; pack the folder again.")


def write_manifest(manifest: Manifest) -> None:
    """Write the manifest; the same shards give the same bytes."""
    tree = asdict(replace(manifest, folder=None))
    del tree["folder"], tree["digest"]
    text = json.dumps({"format": FORMAT, **tree}, indent=1, sort_keys=True) + "\n"
    write_whole(manifest.folder / MANIFEST, text.encode())


def write_shard(path: Place, samples: Iterable[dict[str, Any]], *, split: str) -> ShardInfo:
    """Write samples (`__key__`, `jpg` or `png`, `json`, perhaps `mask.png`) as a tar and its index.

    The tar appears whole or not at all, its index before it; its bytes depend on the samples alone.

    Args:
        path: Of the tar; its place may be remote.
        samples: In order.
        split: The split that it belongs to.
    """
    count = 0
    with becoming(path) as partial:
        with (
            partial.open("wb") as file,
            TarWriter(file, encoder=False, mtime=0, user="root", group="root") as writer,
        ):
            for sample in samples:
                writer.write(sample)
                count += 1
        buffer = io.BytesIO()
        with partial.open("rb") as written:
            sha256 = hashlib.file_digest(written, "sha256").hexdigest()
            written.seek(0)
            np.save(buffer, build_index(written, str(path)))
        info = ShardInfo(path.name, split, count, partial.stat().st_size, sha256)
        write_whole(index_path(path), buffer.getvalue())
    return info


def restore_index(path: Place, info: ShardInfo) -> None:
    """Write the index of a shard again, from the shard.

    Raises:
        DataError: the shard is not what was written.
    """
    data = read_bytes(path)
    if hashlib.sha256(data).hexdigest() != info.sha256:
        raise DataError(
            f"{path}: its bytes are not those that were written; remove it and run the same "
            "sharding command again."
        )
    buffer = io.BytesIO()
    np.save(buffer, build_index(io.BytesIO(data), str(path)))
    write_whole(index_path(path), buffer.getvalue())


def index_path(shard: Place) -> Place:
    """Where the index of a shard is: beside it."""
    return shard.parent / (shard.name.removesuffix(".tar") + ".index.npy")


def build_index(shard: IO[bytes], name: str) -> np.ndarray:
    """The index of a tar, read from its headers alone, `INDEX_DTYPE` [samples].

    Args:
        shard: The tar, open for reading.
        name: What errors call it.

    Raises:
        DataError: the tar is cut short, a sample has no image or no JSON, or a member is none of
            ours: a link, a folder, a path, sparse, of another owner, there twice, or its key is
            too long or not ASCII.
    """
    rows: dict[str, dict[str, int]] = {}
    try:
        with tarfile.open(fileobj=shard, mode="r:") as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                kind = {"json": "json", "mask.png": "mask"}.get(suffix, "image")
                owned = (member.uname, member.gname, member.uid, member.gid) == OWNER
                # Of a sparse file the size is not that of its bytes here.
                plain = owned and member.type == tarfile.REGTYPE and "/" not in member.name
                if (
                    not plain
                    or len(key) > KEY_LENGTH
                    or not key.isascii()
                    or (kind == "image" and suffix not in IMAGE_SUFFIXES)
                ):
                    raise DataError(f"{name}: the member {member.name} does not belong in a shard")
                row = rows.setdefault(key, {})
                if f"{kind}_size" in row:
                    raise DataError(f"{name}: the member {member.name} stands twice")
                row[f"{kind}_offset"], row[f"{kind}_size"] = member.offset_data, member.size
    except (
        tarfile.TarError,
        OSError,
        EOFError,
        ValueError,
        OverflowError,
        MemoryError,
        RecursionError,
    ) as error:
        raise DataError(f"{name}: the tar cannot be read ({error})") from None
    index = np.zeros(len(rows), INDEX_DTYPE)
    for number, (key, row) in enumerate(rows.items()):
        if "image_offset" not in row or "json_offset" not in row:
            raise DataError(f"{name}: the sample {key} has no image or no JSON")
        index[number] = (key, *(row.get(n, 0) for n in NUMBERS))
    return index


def read_index(folder: str | Path, info: ShardInfo) -> np.ndarray:
    """The index of a shard, `INDEX_DTYPE` [samples].

    Raises:
        DataError: it is missing or damaged.
    """
    path = index_path(place(folder) / info.name)
    try:
        index = parse_index(read_bytes(path), info)
    except OSError:
        index = None
    if index is None:
        raise DataError(
            f"{path}: the index is missing or damaged; run 'mlvicx verify {folder}' for its repair."
        )
    return index


def parse_index(data: bytes, info: ShardInfo) -> np.ndarray | None:
    """An index, if its rows are those of the shard and lie in it."""
    try:
        # Not `np.load`, which takes other formats too.
        index: np.ndarray = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except NO_ARRAY:
        return None
    if index.dtype != INDEX_DTYPE or index.shape != (info.samples,):
        return None
    if not index["key"].tobytes().isascii():
        return None
    for kind in ("image", "json", "mask"):
        offsets, sizes = index[f"{kind}_offset"], index[f"{kind}_size"]
        inside = (offsets >= 0) & (sizes >= 0) & (sizes <= info.bytes)
        if not (inside & (offsets <= info.bytes - sizes)).all():
            return None
    return index


def decode_image(data: bytes) -> np.ndarray:
    """A stored image, JPEG or PNG.

    Returns:
        Grey, uint8 or (16-bit PNG) uint16, [H, W].

    Raises:
        DataError: it cannot be decoded, or is larger than any radiograph.
    """
    grey = decode_grey_jpeg(data, most_pixels=MAX_PIXELS)
    if grey is not None:
        return grey
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{image.width} x {image.height} pixels are too many")
            if image.mode.startswith("I"):
                return np.asarray(image).astype(np.uint16)
            return np.asarray(image.convert("L") if image.mode != "L" else image)
    except (
        UnidentifiedImageError,
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombWarning,
        Image.DecompressionBombError,
    ) as error:
        raise DataError(f"the image is damaged: {error}") from None
