"""A folder of phantom radiographs, PNG and DICOM, with the CSV that the folder source reads."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

from mlvicx_dist.errors import ConfigError, DataError
from mlvicx_dist.ingest.sources.anatomy import BITS, CLASSES, Phantom, draw_phantom
from mlvicx_dist.progress import Progress
from mlvicx_dist.session import in_parallel
from mlvicx_dist.storage import write_whole

TABLE = "labels.csv"
POPULATION = "population.json"
SMALLEST_PX = 32
HEADER = ("path", "labels", "patient", "split", "view", "sex", "age")
CHUNK = 16
SALT = bytes(32)
"""Phantoms are nobody: an open salt keeps their shards the same everywhere."""


@dataclass(frozen=True)
class _Task:
    out: Path
    indices: range
    seed: int
    size_px: int
    dicom_fraction: float


def write_phantoms(
    out: Path,
    count: int,
    *,
    seed: int = 0,
    size_px: int = 256,
    dicom_fraction: float = 0.2,
    workers: int | None = 1,
    progress: Progress | None = None,
) -> Path:
    """Draw `count` phantoms, one patient each, into files; those of this population are left.

    Args:
        out: The folder.
        count: How many.
        seed: The population; the same arguments give the same bytes.
        size_px: Side of the images.
        dicom_fraction: The part that becomes DICOM (12 bits, some MONOCHROME1), the rest 8-bit PNG.
        workers: Ray tasks at once; None: as many as there are cores.
        progress: Counts images.

    Returns:
        The path of the CSV that names them all, written last.

    Raises:
        DataError: the folder cannot be written, or holds phantoms of another population.
        ConfigError: a number is out of range.
    """
    if not (seed >= 0 and size_px >= SMALLEST_PX and 0 <= dicom_fraction <= 1 and count > 0):
        raise ConfigError(
            f"phantoms: count {count}, seed {seed}, size {size_px} px, DICOM fraction "
            f"{dicom_fraction}: give 1 or more, 0 or more, {SMALLEST_PX} or more, and 0 to 1."
        )
    population = {"seed": seed, "size_px": size_px, "dicom_fraction": dicom_fraction}
    chunks = [range(i, min(i + CHUNK, count)) for i in range(0, count, CHUNK)]
    tasks = [_Task(out, chunk, seed, size_px, dicom_fraction) for chunk in chunks]
    rows: list[tuple[str, ...]] = []
    try:
        _check_population(out, population)
        for folder in ("images", "dicom"):
            (out / folder).mkdir(parents=True, exist_ok=True)
        for _, part in in_parallel(_write_chunk, tasks, workers=workers):
            rows += part
            if progress:
                progress.advance(len(part))
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([HEADER, *sorted(rows, key=_number)])
        write_whole(out / TABLE, buffer.getvalue().encode())
    except OSError as error:
        raise DataError(
            f"{out}: the phantoms cannot be written ({error.strerror}); make room or choose "
            "another folder."
        ) from None
    return out / TABLE


def _check_population(out: Path, population: dict[str, Any]) -> None:
    """Note whose images are in the folder.

    Raises:
        DataError: those of another population, which would be kept under these labels.
    """
    path, wanted = out / POPULATION, json.dumps(population).encode()
    if (out / "images").exists() and not (path.exists() and path.read_bytes() == wanted):
        raise DataError(
            f"{out}: there are phantoms of another seed, size or DICOM fraction in it; remove it, "
            "or give another folder."
        )
    out.mkdir(parents=True, exist_ok=True)
    write_whole(path, wanted)


def _number(row: tuple[str, ...]) -> str:
    """What the rows are sorted by: the patient's number."""
    return row[HEADER.index("patient")]


def _write_chunk(task: _Task) -> list[tuple[str, ...]]:
    return [_write(task, index) for index in task.indices]


def _write(task: _Task, index: int) -> tuple[str, ...]:
    """Write one phantom where it is not there yet; its row of the CSV."""
    phantom = draw_phantom(task.seed, index, size_px=task.size_px)
    patient = f"phantom-{index:06d}"
    # Spread over the population, and free of the phantom's own random numbers.
    as_dicom = (index * 0.6180339887) % 1 < task.dicom_fraction
    name = f"dicom/{patient}.dcm" if as_dicom else f"images/{patient}.png"
    if not (task.out / name).exists():
        data = _dicom(phantom, patient, index, task.seed) if as_dicom else _png(phantom)
        write_whole(task.out / name, data)
    labels = "|".join(label for label in CLASSES if phantom.labels[label])
    return name, labels, patient, "", phantom.view, phantom.sex, str(phantom.age)


def _png(phantom: Phantom) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((phantom.pixels >> (BITS - 8)).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _dicom(phantom: Phantom, patient: str, index: int, seed: int) -> bytes:
    """A digital radiograph, 12 bits in 16, with rescale and window; every third is MONOCHROME1."""
    inverted = index % 3 == 0
    instance = generate_uid(entropy_srcs=["mlvicx phantom", str(seed), str(index)])
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = instance
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    top = 2**BITS - 1
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, instance
    dataset.Modality, dataset.BodyPartExamined = "DX", "CHEST"
    dataset.PatientID, dataset.PatientSex = patient, phantom.sex
    dataset.PatientAge, dataset.ViewPosition = f"{phantom.age:03d}Y", phantom.view
    dataset.Rows, dataset.Columns = phantom.pixels.shape
    dataset.SamplesPerPixel, dataset.PixelRepresentation = 1, 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, BITS, BITS - 1
    dataset.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    dataset.RescaleSlope, dataset.RescaleIntercept = "1", "0"
    dataset.WindowCenter, dataset.WindowWidth = str((top + 1) / 2), str(top + 1)
    dataset.PixelData = (top - phantom.pixels if inverted else phantom.pixels).tobytes()
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()
