"""How fast radiographs become shards, against the bare library calls that this takes.

python benchmarks/ingest.py [--json]

Files: 1024-px phantoms as 8-bit PNG and as 12-bit DICOM, stored at a short side of 256 px as JPEG
q95. Bare: decode, grey, window, resize and encode in a loop, nothing written. Ours: hash, JSON,
tar, index and digests too. Ray is started before the clock.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
import tempfile
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pydicom
from PIL import Image
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from table import Row, interleaved, main, seconds

from mlvicx_dist.ingest.pack import pack, plan
from mlvicx_dist.ingest.phash import near_pairs
from mlvicx_dist.ingest.record import Record
from mlvicx_dist.ingest.shard_task import PackSettings, pack_shard
from mlvicx_dist.ingest.sources.phantom import write_phantoms
from mlvicx_dist.session import in_parallel, ray_session

IMAGES, SIZE_PX, ROUNDS = 64, 1024, 3
RECORDS = 100_000
GIB = 2**30 / 1e6
SETTINGS = PackSettings(near_duplicates="allow", samples_per_shard=64)
SALT = b"\x01" * 32


def measure() -> list[Row]:
    """Every comparison, on files that are made for it and removed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = []
        for kind, fraction, bare in (("png", 0.0, bare_png), ("12-bit DICOM", 1.0, bare_dicom)):
            source = folder / kind
            write_phantoms(source, IMAGES, size_px=SIZE_PX, dicom_fraction=fraction, workers=None)
            paths = sorted(p for p in source.rglob("*") if p.suffix in (".png", ".dcm"))
            rows.append(against_bare(kind, paths, bare, folder / "out"))
        rows.append(two_cores(paths, folder / "out"))
        rows.append(memory(folder))
    rows.append(near())
    return rows


def bare_png(path: Path) -> None:
    """The library calls that a PNG takes."""
    with Image.open(path) as image:
        encode(image.convert("L"))


def bare_dicom(path: Path) -> None:
    """The library calls that a DICOM file takes."""
    dataset = pydicom.dcmread(path)
    values = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset)
    top = 2 ** int(dataset.BitsStored) - 1
    grey = np.round(values / top * 255).astype(np.uint8)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        grey = 255 - grey
    encode(Image.fromarray(grey))


def encode(image: Image.Image) -> None:
    """Resize and encode as the settings say."""
    side = SETTINGS.short_side_px
    buffer = io.BytesIO()
    image.resize((side, side), Image.Resampling.LANCZOS).save(
        buffer, "JPEG", quality=SETTINGS.quality
    )


def patients(paths: list[Path], turns: int = 4) -> list[Record]:
    """A patient an image, and each file several times over."""
    return [
        Record(source="b", image_id=name, path=str(path), patient_id=name, labels={})
        for turn in range(turns)
        for path in paths
        for name in [f"{turn}/{path.name}"]
    ]


def packed(many: list[Record], out: Path) -> None:
    """Pack on one core into a folder that is removed before."""
    shutil.rmtree(out, ignore_errors=True)
    pack(many, out, settings=SETTINGS, salt=SALT)


def against_bare(kind: str, paths: list[Path], bare: object, out: Path) -> Row:
    """Images a second of one core, ours against the bare calls."""
    many = patients(paths)
    ours, theirs = interleaved(
        lambda: seconds(lambda: packed(many, out)),
        lambda: seconds(lambda: [bare(Path(record.path)) for record in many]),  # type: ignore[operator]
        rounds=ROUNDS,
    )
    name = f"one core against the bare calls, 1024-px {kind}"
    return Row(name, len(many) / ours, len(many) / theirs, "images/s", 0.85)


def two_cores(paths: list[Path], out: Path) -> Row:
    """Images a second of two cores against one: shards alone, without the end of a packing."""
    settings = replace(SETTINGS, samples_per_shard=32)
    many = plan(patients(paths, 16), out, settings=settings, salt=SALT)
    with ray_session({"CPU": 2}, asked="the benchmark", remedy="take a machine of two cores"):

        def run(workers: int) -> float:
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            if workers == 1:
                return seconds(lambda: [pack_shard(task) for task in many])
            return seconds(lambda: list(in_parallel(pack_shard, many, workers=workers)))

        two, one = interleaved(partial(run, 2), partial(run, 1), rounds=ROUNDS)
    count = sum(len(task.records) for task in many)
    return Row("two cores against one", count / two, count / one, "images/s", 1.8)


def memory(folder: Path) -> Row:
    """Peak memory of the workers that pack 10^5 records on all cores, and of the driver."""
    write_phantoms(folder / "small", 1, size_px=64, dicom_fraction=0.0)
    path = next((folder / "small").rglob("*.png"))
    labels = dict.fromkeys(map(str, range(14)), 0)
    many = [
        Record(
            source="b",
            image_id=str(i),
            path=str(path),
            patient_id=str(i // 4),
            labels=labels.copy(),
        )
        for i in range(RECORDS)
    ]
    peaks = {"worker": 0.0, "driver": 0.0}
    done = threading.Event()
    watcher = threading.Thread(target=watch, args=(peaks, done))
    watcher.start()
    pack(
        many,
        folder / "many",
        settings=PackSettings(near_duplicates="allow"),
        salt=SALT,
        workers=None,
    )
    done.set()
    watcher.join()
    name = f"peak memory of a worker, {RECORDS:,} records (driver {peaks['driver']:.0f} MB)"
    return Row(name, peaks["worker"], GIB, "MB", 1.0)


def watch(peaks: dict[str, float], done: threading.Event) -> None:
    """Keep the largest resident memory of this process and of its packing workers, in MB."""
    driver = psutil.Process()
    while not done.wait(0.3):
        peaks["driver"] = max(peaks["driver"], driver.memory_info().rss / 1e6)
        for process in driver.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "pack_shard" in " ".join(process.cmdline()):
                    peaks["worker"] = max(peaks["worker"], process.memory_info().rss / 1e6)


def near() -> Row:
    """Seconds to find near-duplicates among 10^6 hashes in three splits, against a minute."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**64, (10**6, 4), dtype=np.uint64)
    # Radiographs are alike: with 24 bits in common as many pairs meet in a band as among real ones
    # (6 in 10,000, docs/data.md).
    words[:, 0] |= np.uint64(0xFFFFFF0000000000)
    groups = rng.choice(3, len(words), p=[0.7, 0.1, 0.2])
    return Row(
        "near-duplicates among 10^6 images",
        seconds(lambda: near_pairs(words, groups)),
        60,
        "s",
        1.0,
    )


if __name__ == "__main__":
    sys.exit(main(str(__doc__).splitlines()[0], measure))
