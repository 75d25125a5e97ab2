"""The four official layouts, rebuilt small: the real label files over real radiographs.

Each is sharded by its script, verified, read by plain webdataset and streamed as training does.
"""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    generate_uid,
)

from mlvicx_dist.config import Views
from mlvicx_dist.ingest.masks import RunLengths, decode_runs
from mlvicx_dist.ingest.shards import decode_image, read_manifest
from mlvicx_dist.ingest.verify import verify
from mlvicx_dist.stream.loader import Steps, batches
from mlvicx_dist.stream.shardset import ShardSet

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.shared_data


@pytest.fixture
def radiographs(shared_data):
    """The k-th real radiograph, resized."""
    paths = sorted((shared_data / "cxr" / "images").glob("nih*.jpg"))

    def one(number, size_px=256):
        picture = Image.open(paths[number]).convert("L")
        return picture.resize((size_px, size_px), Image.Resampling.LANCZOS)

    return one


def first_names(path, column, count):
    with path.open() as file:
        names = [row[column] for row in csv.DictReader(file)]
    return list(dict.fromkeys(names))[:count]


def kept_rows(path, out, column, names):
    """The rows of a label file that are about these images, the header as it is."""
    lines = path.read_text().splitlines(keepends=True)
    with path.open() as file:
        wanted = [row[column] in names for row in csv.DictReader(file)]
    out.write_text("".join([lines[0], *(x for x, w in zip(lines[1:], wanted, strict=True) if w)]))


def write_dicom(path, picture, *, bits=8, inverted=False, jpeg=False, **tags):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = JPEGBaseline8Bit if jpeg else ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    pixels = np.asarray(picture).astype(np.uint16 if bits > 8 else np.uint8) << (bits - 8)
    top = (1 << bits) - 1
    dataset.Modality, dataset.Rows, dataset.Columns = "CR", *pixels.shape
    dataset.SamplesPerPixel, dataset.PixelRepresentation = 1, 0
    dataset.BitsAllocated = 16 if bits > 8 else 8
    dataset.BitsStored, dataset.HighBit = bits, bits - 1
    dataset.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    if jpeg:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=95)
        dataset.PixelData = encapsulate([buffer.getvalue()])
    else:
        dataset.PixelData = (top - pixels if inverted else pixels).tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)


def shard(name, source, tmp_path, *options):
    """Run a script, check what it wrote, and stream it; its JSON and samples by key."""
    out = tmp_path / f"shards-{name}"
    command = [sys.executable, str(ROOT / "sharding" / f"shard_{name}.py"), "--json"]
    command += ["--source", str(source), "--out", str(out), "--workers", "1", *options]
    command += ["--salt-file", str(tmp_path / "salt"), "--short-side-px", "128"]
    before = {p: p.stat().st_mtime_ns for p in Path(source).rglob("*")}
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {p: p.stat().st_mtime_ns for p in Path(source).rglob("*")} == before
    verdict = verify(out)
    assert (verdict.problems, verdict.leaks) == ((), ())
    manifest = read_manifest(out)
    urls = [str(out / info.name) for info in manifest.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    shards = ShardSet.open([out], splits=list(manifest.splits))
    steps = Steps(shards, Views(image_size_px=32, blur_kernel_px=5), batch=4, seed=0)
    for batch in batches(steps, start=0, stop=2, workers=0):
        assert batch.images.shape == (2, 4, 1, 32, 32)
        assert batch.images.float().std() > 10
    return json.loads(done.stdout), samples


def test_nih(shared_data, radiographs, tmp_path):
    formats = shared_data / "label_formats"
    names = first_names(formats / "Data_Entry_2017_v2020.csv", "Image Index", 24)
    source = tmp_path / "nih"
    for number, name in enumerate(names[:-1]):
        folder = source / f"images_{number % 3 + 1:03d}" / "images"
        folder.mkdir(parents=True, exist_ok=True)
        picture = radiographs(number)
        (picture.convert("RGBA") if number == 5 else picture).save(folder / name)
    entries = source / "Data_Entry_2017_v2020.csv"
    kept_rows(formats / entries.name, entries, "Image Index", names)
    for file in ("train_val_list.txt", "test_list.txt", "BBox_List_2017.csv"):
        (source / file).write_bytes((formats / file).read_bytes())
    document, samples = shard("nih", source, tmp_path, "--near-duplicates", "allow")
    assert f"1 of 24 images of {entries.name} are missing" in document["notes"][0]
    assert len(samples) == 23
    assert len(document["classes"]) == 14
    listed = set((source / "test_list.txt").read_text().split())
    in_test = sum(json.loads(s["json"])["split"] == "test" for s in samples)
    assert in_test == len(listed & set(names[:-1]))


def test_vinbig(shared_data, radiographs, tmp_path):
    table = shared_data / "label_formats" / "vinbigdata_train.csv"
    names = first_names(table, "image_id", 16)
    source = tmp_path / "vinbig"
    for number, name in enumerate(names):
        write_dicom(
            source / "train" / f"{name}.dicom",
            radiographs(number),
            bits=12 + number % 5,
            inverted=number % 2 == 1,
            WindowCenter=str(1 << (11 + number % 5)),
            WindowWidth=str(1 << (12 + number % 5)),
        )
    kept_rows(table, source / "train.csv", "image_id", names)
    _, samples = shard("vinbig", source, tmp_path)
    assert len(samples) == 16
    # Whatever the bits and the interpretation, the stored picture is the one that was written.
    stored = np.stack([decode_image(sample["jpg"]) for sample in samples]).astype(float)
    for number in range(16):
        original = np.asarray(radiographs(number, 128), dtype=float)
        assert np.abs(stored - original).mean((1, 2)).min() < 4


def test_rsna(shared_data, radiographs, tmp_path):
    formats = shared_data / "label_formats"
    labels, detail = "stage_2_train_labels.csv", "stage_2_detailed_class_info.csv"
    names = first_names(formats / labels, "patientId", 16)
    source = tmp_path / "rsna"
    for number, name in enumerate(names):
        path = source / "stage_2_train_images" / f"{name}.dcm"
        age = {"PatientAge": f"{30 + number:03d}Y", "PatientSex": "F", "ViewPosition": "AP"}
        write_dicom(path, radiographs(number), jpeg=True, **age)
    for file in (labels, detail):
        kept_rows(formats / file, source / file, "patientId", names)
    _, samples = shard("rsna", source, tmp_path)
    known = [json.loads(sample["json"]) for sample in samples]
    assert {k["age"] for k in known} == set(range(30, 46))
    assert {(k["sex"], k["view"]) for k in known} == {("F", "AP")}
    for k in known:
        assert bool(k["boxes"]) == (k["labels"]["Lung Opacity"] == 1)
        assert sum(k["labels"].values()) == 1


def test_siim(shared_data, radiographs, tmp_path):
    table = shared_data / "label_formats" / "siim_train-rle.csv"
    names = first_names(table, "ImageId", 12)
    source = tmp_path / "siim"
    for number, name in enumerate(names):
        path = source / "dicom-images-train" / f"study{number}" / "series" / f"{name}.dcm"
        write_dicom(path, radiographs(number, 1024), jpeg=True)
    kept_rows(table, source / "train-rle.csv", "ImageId", names)
    _, samples = shard("siim", source, tmp_path)
    runs = {}
    with table.open() as file:
        for row in csv.DictReader(file, skipinitialspace=True):
            if row["EncodedPixels"].strip() != "-1":
                runs.setdefault(row["ImageId"], []).append(row["EncodedPixels"])
    expected = sorted(
        decode_runs(RunLengths(tuple(runs.get(name, ())))).sum() / 64 for name in names
    )
    areas = sorted((decode_image(sample["mask.png"]) > 0).sum() for sample in samples)
    assert np.allclose(areas, expected, rtol=0.1, atol=16)
    labels = [json.loads(sample["json"])["labels"]["Pneumothorax"] for sample in samples]
    assert sum(labels) == sum(name in runs for name in names)
