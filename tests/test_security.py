"""What comes from elsewhere runs nothing, leaves its place nowhere and fills no memory.

Promises that belong to one module have their tests with that module; docs/security.md names all.
"""

import io
import json
import logging
import pickle
import re
import resource
import runpy
import shutil
import struct
import tarfile
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pydicom
import pytest
import yaml
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit, RLELossless

from mlvicx_dist.cli import main
from mlvicx_dist.config import Model, parse_config, to_tree
from mlvicx_dist.errors import CheckpointError, DataError
from mlvicx_dist.evaluate.embed import Embeddings
from mlvicx_dist.evaluate.evaluation import evaluate
from mlvicx_dist.ingest.pixels import read_image
from mlvicx_dist.ingest.refused import Refused
from mlvicx_dist.ingest.shards import build_index, decode_image, index_path, read_manifest
from mlvicx_dist.progress import plain
from mlvicx_dist.report import page
from mlvicx_dist.report.page import write_report
from mlvicx_dist.stream.shardset import ShardSet
from mlvicx_dist.train.weights import load_encoder


class Opened:
    """A pickle that, where it is opened, leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def shards(phantom_shards, tmp_path):
    return shutil.copytree(phantom_shards, tmp_path / "shards")


def rewritten(folder, changes):
    """The manifest with other values; those of `shard` go to the first shard."""
    tree = json.loads((folder / "manifest.json").read_text())
    tree["shards"][0] |= changes.pop("shard", {})
    (folder / "manifest.json").write_text(json.dumps(tree | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shard": {"name": "../elsewhere.tar"}}, "is no shard of it"),
        ({"shard": {"name": "/etc/elsewhere.tar"}}, "is no shard of it"),
        ({"shard": {"name": "pipe:cat.tar"}}, "is no shard of it"),
        ({"shard": {"sha256": "../../elsewhere"}}, "is no shard of it"),
        ({"shard": {"samples": 2**70}}, "cannot have"),
        ({"shard": {"bytes": -1}}, "cannot have"),
        ({"shard": {"split": "train\x1b[2J"}}, "is no text"),
        ({"classes": ["\x1b]0;title\x07"]}, "is no text"),
        ({"sources": {"a\nb": 1}}, "is no text"),
        ({"classes": [1]}, "the manifest is damaged"),
        ({"splits": ["train"]}, "the manifest is damaged"),
        ({"sources": ["a"]}, "the manifest is damaged"),
        ({"settings": None}, "the manifest is damaged"),
        ({"shards": [{}]}, "the manifest is damaged"),
    ],
)
def test_a_manifest_names_its_own_shards_in_plain_text(shards, changes, words):
    rewritten(shards, dict(changes))
    with pytest.raises(DataError, match=words) as caught:
        read_manifest(shards)
    assert str(caught.value).isprintable()


def test_a_manifest_without_end_is_one_sentence(shards):
    (shards / "manifest.json").write_bytes(b"[" * 10**6)
    with pytest.raises(DataError, match="the manifest is damaged"):
        read_manifest(shards)


def header(rows):
    """An index that says how many rows it has, and ends."""
    text = f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({rows}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def archive():
    buffer = io.BytesIO()
    np.savez(buffer, key=np.zeros(8))
    return buffer.getvalue()


def objects(path):
    buffer = io.BytesIO()
    np.save(buffer, np.array([Opened(path)], object), allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "make",
    [
        lambda index, path: pickle.dumps(Opened(path)),
        lambda index, path: objects(path),
        lambda index, path: archive(),
        lambda index, path: header("10000000000000000,)}\n"),
        lambda index, path: header("\n"),
        lambda index, path: saved(index[:-1]),
        lambda index, path: saved(shifted(index, -1)),
        lambda index, path: saved(shifted(index, 10**12)),
    ],
    ids=["pickle", "objects", "archive", "endless", "torn", "short", "before", "beyond"],
)
def test_an_index_is_numbers_that_lie_in_its_shard(shards, make, tmp_path):
    name = read_manifest(shards).shards[0].name
    path = index_path(shards / name)
    path.write_bytes(make(np.load(path), tmp_path / "ran"))
    split = name.split("-")[0]
    with pytest.raises(DataError, match="the index is missing or damaged"):
        ShardSet.open([shards], splits=[split]).image(0)
    assert not (tmp_path / "ran").exists()


def saved(index):
    buffer = io.BytesIO()
    np.save(buffer, index)
    return buffer.getvalue()


def shifted(index, by):
    index = index.copy()
    index["image_offset"] = by
    return index


KEY = "a" * 32


def tar(*members):
    """A tar of (name, kind) whose owner is ours, and one whole sample."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as file:
        for name, kind in [(f"{KEY}.json", tarfile.REGTYPE), *members]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            info.uname = info.gname = "root"
            file.addfile(info, io.BytesIO())
    return buffer.getvalue()


def sparse():
    """A member that says that it is 8 GB large and holds nothing."""
    head = bytearray(tar((f"{KEY}.jpg", tarfile.REGTYPE))[512:1024])
    head[156:157] = tarfile.GNUTYPE_SPARSE
    head[386:482] = bytes(96)
    head[483:495] = b"77777777777\0"
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + tar()


def long_names():
    """Names that only say that a name follows."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1
    return (info.tobuf(tarfile.GNU_FORMAT) + b"a".ljust(512, b"\0")) * 5000


REGULAR = tarfile.REGTYPE


@pytest.mark.parametrize(
    "data",
    [
        *(tar((name, REGULAR)) for name in (f"../{KEY}.jpg", f"/{KEY}.jpg", f"{KEY}.jpg/x")),
        *(tar((f"{KEY}.{suffix}", REGULAR)) for suffix in ("pyd", "pkl", "pt", "so", "npy")),
        *(
            tar((f"{KEY}.jpg", kind))
            for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE)
        ),
        sparse(),
    ],
)
def test_a_member_with_a_path_a_link_or_code_does_not_belong_in_a_shard(data):
    with pytest.raises(DataError, match="does not belong in a shard"):
        build_index(io.BytesIO(data), "x.tar")


@pytest.mark.parametrize("data", [long_names(), b"\x1f\x8b" + bytes(10**6)])
def test_a_tar_without_end_is_one_sentence(data):
    with pytest.raises(DataError, match="the tar cannot be read"):
        build_index(io.BytesIO(data), "x.tar")


def dicom(syntax, frame, *, bits=8):
    """A file of 64 x 64 pixels whose compressed frame may say otherwise."""
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPInstanceUID = syntax, "1.2.3"
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    dataset = pydicom.dataset.FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    dataset.Rows = dataset.Columns = 64
    dataset.BitsAllocated = dataset.BitsStored = bits
    dataset.HighBit, dataset.PixelRepresentation, dataset.SamplesPerPixel = bits - 1, 0, 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.PixelData = encapsulate([frame]) if syntax.is_compressed else frame
    dataset["PixelData"].VR = "OB"
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def picture(form, side_px, **how):
    buffer = io.BytesIO()
    Image.new("L", (side_px, side_px)).save(buffer, form, **how)
    return buffer.getvalue()


def run_lengths():
    """Two segments of 16 MB that unpack to 1 GB each."""
    segment = b"\x81\x00" * 2**23
    return struct.pack("<16L", 2, 64, 64 + len(segment), *[0] * 13) + 2 * segment


def large_png():
    """64 MB of grey, which say that they are 1 GB, in 64 kB."""
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(2**20)) for _ in range(64)) + packer.flush()

    def chunk(kind, data):
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    size = struct.pack(">IIBBBBB", 2**15, 2**15, 8, 0, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size)
    return head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def large_jpeg():
    """A small JPEG that says that it is 65,000 pixels wide and high."""
    data = bytearray(picture("JPEG", 64))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", 65000, 65000)
    return bytes(data)


BOMBS = {
    "png": (large_png, "exceeds limit"),
    "jpeg": (large_jpeg, "exceeds limit"),
    "rle": (lambda: dicom(RLELossless, run_lengths(), bits=16), "OUTPUT_TOO_SMALL"),
    "jpeg-in-dicom": (lambda: dicom(JPEGBaseline8Bit, large_jpeg()), "the compressed frame is"),
    "jpeg2000-in-dicom": (
        lambda: dicom(JPEG2000Lossless, picture("JPEG2000", 100)),
        "the compressed frame is 100 x 100",
    ),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_picture_that_unpacks_to_far_more_is_refused_before_it_does(kind):
    make, words = BOMBS[kind]
    data = make()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Refused, match=words):
        read_image(io.BytesIO(data))
    if kind in ("png", "jpeg"):
        with pytest.raises(DataError):
            decode_image(data)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert 1024 * grown < 4 * len(data) + 2**26


@pytest.mark.parametrize("form", ["EPS", "GIF", "PCX", "PPM", "TGA", "ICO"])
def test_only_the_formats_of_radiographs_are_opened_whatever_a_file_is_called(form, tmp_path):
    path = tmp_path / "image.png"
    Image.new("L", (64, 64)).save(path, form)
    with path.open("rb") as file, pytest.raises(Refused, match="not an image"):
        read_image(file)


HOSTILE = "</td></script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{ 7 * 7 }}"


class Tags(HTMLParser):
    """The tags of a page with the names of their attributes, in order."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, [name for name, _ in attrs]))


def run_of(folder, name):
    """A run whose class, subgroup, head, image set and machine bear a name."""
    config = parse_config(
        {"kind": "pretrain", "run": {"name": "r"}, "data": {"shards": [{"path": "gone"}]}}, "t"
    )
    (folder / "evaluations").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_tree(config)))
    row = dict.fromkeys(("step", "epoch", "time_s", "images_per_s", "data_wait", "loss"), 1)
    row |= {f"{name.replace('/', '|')}/{term}": 1 for term in ("std", "variance_weighted")}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "environment.json").write_text(
        json.dumps({"world_size": 1, "machine": {name: name}, "versions": {name: name}})
    )
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (120, 2)).astype(float)
    labels[:, 1] = 0
    views = tuple(rng.normal(size=(120, 4)).astype(np.float32) for _ in range(2))
    about = tuple(
        {"split": split, "patient": str(k), "source": name, "key": str(k), "view": "PA"}
        for k, split in enumerate(["train"] * 60 + ["val"] * 30 + ["test"] * 30)
    )
    pixels = rng.uniform(size=(120, 576)).astype(np.float32)
    embeddings = Embeddings((*views, pixels), labels, (name, f"{name} 2"), about)
    result = evaluate(
        embeddings,
        parse_config(
            {
                "kind": "evaluate",
                "name": "t",
                "data": {"shards": ["x"]},
                "bootstrap": {"draws": 100},
            },
            "t",
        ),
    )
    assert f"{name} 2" in result["left_out"]
    known = {"checkpoint": "c", "overlap": {"unknown": name}, "missing": [name]}
    (folder / "evaluations" / "t.json").write_text(json.dumps(result | known))
    return folder


def test_a_page_shows_names_and_obeys_none(tmp_path):
    hostile, plain = (
        write_report(run_of(tmp_path / folder, name)).read_text()
        for folder, name in (("hostile", HOSTILE), ("plain", "nodule"))
    )
    assert Tags(hostile).found == Tags(plain).found
    assert "&lt;script&gt;alert(1)" in hostile and "<script>alert(1)" not in hostile
    assert "{{ 7 * 7 }}" in hostile


def test_the_templates_of_pages_escape_all_but_what_is_ours():
    """Charts are JSON in which '<' is escaped; see the page above."""
    folder = Path(page.__file__).parent / "templates"
    found = {
        words
        for path in folder.glob("*.html.j2")
        for words in re.findall(r"\{\{ *([^|}]*?) *\| *safe", path.read_text())
    }
    assert found == {"one.figure", "' class=\"mean\"'", "' wide\" tabindex=\"0'"}


NAMES = {
    "PatientName": "DOE^JANE",
    "PatientID": "ID4711",
    "PatientBirthDate": "19610203",
    "PatientAddress": "Elmstreet",
    "AccessionNumber": "ACC4711",
    "StudyDate": "20230405",
    "InstitutionName": "Saint Elsewhere",
    "StudyInstanceUID": "1.2.840.99999.4711",
    "StudyDescription": "Jane after her fall",
    "ImageComments": "Jane Doe",
}


def test_nothing_of_a_header_is_in_shards_on_the_screen_or_in_a_log(tmp_path, capfd, caplog):
    rng, source = np.random.default_rng(0), tmp_path / "source"
    source.mkdir()
    for number, modality in enumerate(["DX"] * 7 + ["DOE^JANE"]):
        data = dicom(ExplicitVRLittleEndian, rng.integers(0, 255, 64 * 64, np.uint8).tobytes())
        dataset = pydicom.dcmread(io.BytesIO(data))
        for tag, value in NAMES.items():
            setattr(dataset, tag, value)
        dataset.Modality, dataset.SeriesDescription = modality, "Jane"
        block = dataset.private_block(0x0011, "DOE^JANE", create=True)
        block.add_new(1, "LO", "DOE^JANE")
        dataset.save_as(source / f"{number}.dcm")
    (source / "6.dcm").write_bytes((source / "6.dcm").read_bytes()[:-99])
    script = Path(__file__).parents[1] / "sharding" / "shard_folder.py"
    arguments = ["--source", source, "--out", tmp_path / "out", "--workers", "1"]
    arguments += ["--max-refused", "0.5", "--near-duplicates", "allow"]
    arguments += ["--salt-file", tmp_path / "salt"]
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.DEBUG):
        patch.setattr("sys.argv", [str(script), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(script), run_name="__main__")
    assert not ended.value.code
    said = "".join(capfd.readouterr()) + caplog.text
    assert "modality 1" in said
    shards = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert b"jpg" in shards
    for name in NAMES.values():
        assert name not in said
        assert name.encode() not in shards
    assert (tmp_path / "salt").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "out.refused.csv").stat().st_mode & 0o777 == 0o600


def test_an_export_whose_weights_are_a_pickle_is_not_opened(tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    evil = pickle.dumps(Opened(tmp_path / "ran"))
    for name in ("encoder.safetensors", "encoder.pt", "pytorch_model.bin", "README.md"):
        (folder / name).write_bytes(evil)
    settings = Model().model_dump(mode="json", by_alias=True)
    (folder / "config.json").write_text(json.dumps({"model": settings, "image_size_px": 32}))
    with pytest.raises(CheckpointError, match="it is no whole export"):
        load_encoder(folder)
    assert not (tmp_path / "ran").exists()


def test_a_terminal_shows_what_it_would_obey(shards, capsys):
    rewritten(shards, {"version": "\x1b[2J", "format": 99})
    assert main(["verify", str(shards)]) == 2
    error = capsys.readouterr().err.strip()
    assert "?[2J" in error and error.isprintable()
    assert plain("a\x1b]0;b\x07\n") == "a?]0;b?\n"
