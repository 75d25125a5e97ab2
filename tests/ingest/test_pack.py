"""Packing: the same bytes always, nothing lost by a crash, nothing left out in silence."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from runs import encode_runs

import mlvicx_dist
from mlvicx_dist.config import Views
from mlvicx_dist.errors import DataError, TooManyRefusedError
from mlvicx_dist.ingest.command import run_sharding
from mlvicx_dist.ingest.masks import RunLengths, stored_mask
from mlvicx_dist.ingest.pack import pack, plan
from mlvicx_dist.ingest.pixels import read_image
from mlvicx_dist.ingest.record import ALLOWED_KEYS, Box, Record
from mlvicx_dist.ingest.refused import Refused
from mlvicx_dist.ingest.shard_task import PackSettings
from mlvicx_dist.ingest.shards import (
    build_index,
    decode_image,
    index_path,
    parse_index,
    read_index,
    read_manifest,
)
from mlvicx_dist.ingest.sources.folder import list_folder
from mlvicx_dist.ingest.sources.tables import Listing
from mlvicx_dist.ingest.verify import verify
from mlvicx_dist.progress import Progress
from mlvicx_dist.report.contact import contact_sheet
from mlvicx_dist.storage import files_below, place, write_whole
from mlvicx_dist.stream.shardset import ShardSet

SETTINGS = PackSettings(short_side_px=48, samples_per_shard=8)


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def test_plain_webdataset_reads_every_sample(phantom_shards):
    manifest = read_manifest(phantom_shards)
    urls = [str(phantom_shards / shard.name) for shard in manifest.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == 60 == sum(manifest.splits.values())
    assert len({sample["__key__"] for sample in samples}) == 60
    for sample in samples:
        assert sorted(json.loads(sample["json"])) == sorted(ALLOWED_KEYS)
        assert decode_image(sample["jpg"]).shape == (48, 48)


def test_the_index_points_at_the_members(phantom_shards):
    shard = read_manifest(phantom_shards).shards[0]
    index = read_index(phantom_shards, shard)
    with (phantom_shards / shard.name).open("rb") as file:
        assert np.array_equal(index, build_index(file, shard.name))
    data = (phantom_shards / shard.name).read_bytes()
    for row in index:
        start = row["json_offset"]
        assert json.loads(data[start : start + row["json_size"]])["split"] == shard.split


def test_an_index_whose_keys_are_not_ascii_is_damaged(phantom_shards):
    shard = read_manifest(phantom_shards).shards[0]
    index = read_index(phantom_shards, shard).copy()

    def parsed():
        buffer = io.BytesIO()
        np.save(buffer, index)
        return parse_index(buffer.getvalue(), shard)

    assert np.array_equal(parsed(), index)
    index["key"][1] = b"\xff" * 32
    assert parsed() is None


def test_one_worker_and_two_write_the_same_bytes(phantom_records, salt, tmp_path):
    one = pack(phantom_records, tmp_path / "one", settings=SETTINGS, salt=salt)
    two = pack(phantom_records[::-1], tmp_path / "two", settings=SETTINGS, salt=salt, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert one.manifest.digest == two.manifest.digest


def test_no_patient_is_named_and_none_is_in_two_splits(phantom_records, phantom_shards):
    everything = b"".join(contents(phantom_shards).values())
    for record in phantom_records:
        assert record.patient_id.encode() not in everything


@pytest.mark.slow
def test_a_killed_packing_goes_on_and_ends_in_the_same_bytes(phantom_files, tmp_path, salt):
    (tmp_path / "salt").write_text(salt.hex())
    script = os.path.join(os.path.dirname(__file__), "../../sharding/shard_folder.py")
    command = [
        *(sys.executable, script, "--source", str(phantom_files), "--workers", "2"),
        *("--csv", str(phantom_files / "labels.csv"), "--samples-per-shard", "4"),
        *("--short-side-px", "64", "--salt-file", str(tmp_path / "salt"), "--json", "--out"),
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, str(whole)], check=True, capture_output=True)
    process = subprocess.Popen([*command, str(killed)])
    deadline = time.monotonic() + 60
    while len(list(killed.glob(".packing/*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "manifest.json").exists()
    finished = [p.name.removesuffix(".json") for p in killed.glob(".packing/*.json")]
    before = {name: (killed / name).stat().st_mtime_ns for name in finished}
    result = subprocess.run([*command, str(killed)], check=True, capture_output=True, text=True)
    assert json.loads(result.stdout)["kept"] == len(finished) >= 3
    assert {name: (killed / name).stat().st_mtime_ns for name in finished} == before
    assert contents(killed) == contents(whole)
    again = subprocess.run([*command, str(killed)], check=True, capture_output=True, text=True)
    assert json.loads(again.stdout)["already_packed"]


def test_another_salt_is_refused(phantom_records, phantom_shards):
    with pytest.raises(DataError, match="another salt"):
        pack(phantom_records, phantom_shards, settings=SETTINGS, salt=b"\x02" * 32)


def test_what_another_version_packed_is_said(phantom_records, phantom_shards, salt, monkeypatch):
    monkeypatch.setattr(mlvicx_dist, "__version__", "9.9")
    with pytest.raises(DataError, match=r"mlvicx_dist [\d.]+ packed this, and this is 9\.9"):
        pack(phantom_records, phantom_shards, settings=PackSettings(), salt=salt)


@pytest.fixture
def damaged(tmp_path):
    """Ten images, one of them garbage and one empty."""
    records = []
    for number in range(10):
        path = tmp_path / f"{number}.png"
        Image.fromarray(np.arange(64 * 64).reshape(64, 64).astype(np.uint8) + number).save(path)
        records.append(
            Record(source="s", image_id=path.name, path=str(path), patient_id=path.name, labels={})
        )
    (tmp_path / "3.png").write_bytes(b"not an image")
    (tmp_path / "4.png").write_bytes(b"")
    return records


def test_a_bad_image_is_skipped_counted_and_listed(damaged, salt, tmp_path):
    out = tmp_path / "out"
    report = pack(damaged, out, settings=SETTINGS, salt=salt, max_refused=0.5)
    assert report.reasons() == {"unreadable": 2}
    assert sum(report.manifest.splits.values()) == 8
    listed = tmp_path / "out.refused.csv"  # beside the shards: paths do not travel with them
    assert "3.png" in listed.read_text()
    assert "4.png" in listed.read_text()
    assert listed.stat().st_mode & 0o777 == 0o600


def test_a_report_holds_no_formula():
    for detail in ("=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\t=1"):
        assert Refused("unreadable", detail).detail.startswith("'")
    assert Refused("unreadable", "a=1").detail == "a=1"


def test_too_many_bad_images_write_no_manifest(damaged, salt, tmp_path):
    with pytest.raises(TooManyRefusedError, match="2 of 10 files") as caught:
        pack(damaged, tmp_path / "out", settings=SETTINGS, salt=salt)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_file_that_was_mended_is_packed_by_the_same_command(damaged, salt, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(TooManyRefusedError):
        pack(damaged, out, settings=SETTINGS, salt=salt)
    inside = b"".join(p.read_bytes() for p in out.rglob("*") if p.is_file())
    assert str(tmp_path).encode() not in inside  # paths may name patients
    for number in (3, 4):
        shutil.copy(tmp_path / "5.png", tmp_path / f"{number}.png")
    settings = replace(SETTINGS, near_duplicates="allow")
    report = pack(damaged, out, settings=settings, salt=salt)
    assert report.reasons() == {}
    assert sum(report.manifest.splits.values()) == 10
    assert not (out / ".packing").exists()


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("stored", ["jpeg", "png8", "png16"])
def test_comments_and_profiles_of_a_file_do_not_reach_a_shard(form, stored, salt, tmp_path):
    picture = Image.fromarray(np.arange(64 * 64).reshape(64, 64).astype(np.uint8))
    text = PngInfo()
    for key in ("comment", "Description"):
        text.add_itxt(key, "DOE^JANE")
    path = tmp_path / f"a.{form.lower()}"
    picture.save(path, form, comment=b"DOE^JANE", pnginfo=text, icc_profile=b"DOE^JANE", dpi=(1, 1))
    assert b"DOE^JANE" in path.read_bytes()
    record = Record(
        source="s", image_id="a", path=str(path), patient_id="p", labels={}, split="train"
    )
    settings = PackSettings(format=stored)
    pack([record], tmp_path / "out", settings=settings, salt=salt)
    assert b"DOE^JANE" not in b"".join(contents(tmp_path / "out").values())
    assert verify(tmp_path / "out").problems == ()


@pytest.mark.parametrize(
    ("values", "top"),
    [
        (np.arange(4096, dtype=np.uint16), 4095),
        (np.arange(4096, dtype=np.uint16) * 16, 65535),
        (np.linspace(0, 1, 4096, dtype=np.float32), 1),
        (np.arange(4096, dtype=np.int32) * 4, 16383),
    ],
)
def test_deep_images_fill_the_range_whatever_their_bits(values, top, tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(values.reshape(64, 64)).save(path)
    for bits in (8, 16):
        with path.open("rb") as file:
            grey = np.asarray(read_image(file, bits=bits)[0], dtype=float).reshape(-1)
        wanted = values.astype(float) / top * (2**bits - 1)
        assert np.abs(grey - wanted).max() <= 0.51


def test_a_blank_image_is_refused(salt, tmp_path, damaged):
    for number in (3, 4):
        Image.new("L", (64, 64), 7).save(tmp_path / f"{number}.png")
    report = pack(damaged, tmp_path / "out", settings=SETTINGS, salt=salt, max_refused=0.5)
    assert report.reasons() == {"blank": 2}


def test_a_lost_index_is_made_from_the_shard_and_the_shard_is_left(phantom_records, salt, tmp_path):
    out = tmp_path / "out"
    pack(phantom_records, out, settings=SETTINGS, salt=salt)
    before = contents(out)
    shard = min(out.glob("*.tar"))
    time_ns = shard.stat().st_mtime_ns
    index_path(shard).unlink()
    assert pack(phantom_records, out, settings=SETTINGS, salt=salt).already_packed
    assert contents(out) == before
    assert shard.stat().st_mtime_ns == time_ns


def test_json_is_all_that_a_script_prints_on_stdout(
    phantom_records, salt, tmp_path, monkeypatch, capsys
):
    def listed(options):
        sys.stdout.write("Ray was here")
        return Listing(phantom_records, salt=salt)

    command = ["shard_x.py", "--out", str(tmp_path / "out"), "--workers", "1", "--json"]
    monkeypatch.setattr(sys, "argv", command)
    assert run_sharding("x", lambda parser: None, listed) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["out"] == str(tmp_path / "out")
    assert "Ray was here" in printed.err


@pytest.mark.parametrize(
    ("out", "words"),
    [("SOURCE/shards", "lies in the source"), ("http://127.0.0.1:9/x", "http cannot be written")],
)
def test_an_out_that_cannot_be_is_one_sentence(phantom_files, tmp_path, salt, out, words):
    (tmp_path / "salt").write_text(salt.hex())
    script = Path(__file__).parents[2] / "sharding" / "shard_folder.py"
    command = [sys.executable, str(script), "--source", str(phantom_files)]
    command += ["--out", out.replace("SOURCE", str(phantom_files))]
    command += ["--salt-file", str(tmp_path / "salt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (phantom_files / "shards").exists()


def test_a_folder_that_was_not_packed_to_the_end_says_so(tmp_path):
    with pytest.raises(DataError, match="run the same sharding command again"):
        read_manifest(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        read_manifest(tmp_path / "nowhere")


@pytest.mark.parametrize("format", ["png8", "png16"])
def test_lossless_formats_keep_the_pixels(format, salt, tmp_path):
    pixels = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    Image.fromarray(pixels).save(tmp_path / "a.png")
    record = Record(
        source="s",
        image_id="a",
        path=str(tmp_path / "a.png"),
        patient_id="p",
        labels={},
        split="train",
    )
    settings = PackSettings(short_side_px=64, format=format)
    pack([record], tmp_path / "out", settings=settings, salt=salt)
    (url,) = (str(p) for p in (tmp_path / "out").glob("*.tar"))
    (sample,) = webdataset.WebDataset(url, shardshuffle=False)
    stored = decode_image(sample["png"])
    if format == "png16":
        assert stored.dtype == np.uint16
        assert np.array_equal(stored, pixels)
    else:
        assert np.abs(stored.astype(int) - pixels / 257).max() <= 0.51


def test_no_piece_of_a_mask_is_lost_where_it_is_made_smaller():
    mask = np.zeros((64, 48), bool)
    mask[4:12, 4:12] = True  # Large: as it was.
    mask[20, 8:40] = True  # A line: a line.
    mask[40, 40] = mask[41, 41] = True  # Two that touch, in one pixel of four by four.
    mask[63, 0] = True
    stored = np.asarray(Image.open(io.BytesIO(stored_mask(mask, (12, 16)))))
    expected = np.zeros((16, 12), bool)
    expected[1:3, 1:3] = True
    expected[5, 2:10] = True
    expected[10, 10] = expected[15, 0] = True
    assert np.array_equal(stored, 255 * expected)
    # By another factor, and one that is no whole number.
    for size in [(48, 64), (7, 9), (47, 63)]:
        pieces = {(20, 24): (20, 24), (63, 47): (63, 47), (0, 0): (0, 0)}
        for row, column in pieces:
            mask = np.zeros((64, 48), bool)
            mask[row, column] = True
            stored = np.asarray(Image.open(io.BytesIO(stored_mask(mask, size))))
            (place,) = np.argwhere(stored)
            assert abs((place[0] + 0.5) / size[1] - (row + 0.5) / 64) <= 0.5 / size[1]
            assert abs((place[1] + 0.5) / size[0] - (column + 0.5) / 48) <= 0.5 / size[0]
    assert not np.asarray(Image.open(io.BytesIO(stored_mask(mask & False, (7, 9))))).any()


def test_a_mask_goes_with_its_image_and_is_resized_with_it(salt, tmp_path):
    mask = np.zeros((64, 64), bool)
    mask[8:24, 32:60] = True
    Image.fromarray(mask.astype(np.uint8) * 200).save(tmp_path / "a.png")
    runs = RunLengths((encode_runs(mask),), 64, 64)
    record = Record(
        source="s",
        image_id="a",
        path=str(tmp_path / "a.png"),
        patient_id="p",
        labels={"x": 1},
        split="train",
        mask=runs,
        boxes=(Box(label="x", left=32, top=8, right=60, bottom=24),),
    )
    wrong = replace(record, image_id="b", mask=RunLengths((), 64, 32))
    settings = PackSettings(short_side_px=32, format="png8")
    report = pack([record, wrong], tmp_path / "out", settings=settings, salt=salt, max_refused=0.5)
    assert report.reasons() == {"mask-size": 1}
    (sample,) = webdataset.WebDataset(str(tmp_path / "out/train-000000.tar"), shardshuffle=False)
    stored = decode_image(sample["mask.png"])
    assert set(np.unique(stored)) == {0, 255}
    assert np.array_equal(np.argwhere(stored).min(0), [4, 16])
    assert np.array_equal(np.argwhere(stored).max(0), [11, 29])
    (box,) = json.loads(sample["json"])["boxes"]
    assert box == {"label": "x", "left": 16, "top": 4, "right": 30, "bottom": 12}
    shards = ShardSet.open([tmp_path / "out"], splits=["train"])
    assert np.array_equal(shards.mask(0), stored)
    assert verify(tmp_path / "out").problems == ()
    sheet, _ = contact_sheet([tmp_path / "out"], Views(), count=1)
    assert sheet.getpixel((6 + 112, 6 + 40))[0] > sheet.getpixel((6 + 112, 6 + 40))[2]


def test_a_dicom_header_fills_in_what_the_table_leaves_out(phantom_files, salt, tmp_path):
    records = list_folder(phantom_files / "dicom", name="x").records
    assert {r.patient_id for r in records} == {Path(r.path).stem for r in records}
    pack(records, tmp_path / "out", settings=SETTINGS, salt=salt)
    urls = [str(path) for path in (tmp_path / "out").glob("*.tar")]
    known = [json.loads(s["json"]) for s in webdataset.WebDataset(urls, shardshuffle=False)]
    assert {k["view"] for k in known} <= {"PA", "AP"}
    assert {k["sex"] for k in known} <= {"F", "M"}
    assert all(20 <= k["age"] <= 89 for k in known)


def test_a_store_takes_the_same_bytes_and_goes_on(phantom_records, salt, s3, tmp_path, monkeypatch):
    for source in phantom_records:
        key = f"{s3}/in/{Path(source.path).name}"
        write_whole(place(key), Path(source.path).read_bytes())
    records = [replace(r, path=f"{s3}/in/{Path(r.path).name}") for r in phantom_records]
    before = place(f"{s3}/in").fs.find("bucket/in")
    pack(phantom_records, tmp_path / "local", settings=SETTINGS, salt=salt)
    monkeypatch.chdir(tmp_path)
    report = pack(records, f"{s3}/out", settings=SETTINGS, salt=salt)
    remote = {
        path: (place(f"{s3}/out") / path).read_bytes() for path in files_below(place(f"{s3}/out"))
    }
    assert remote == contents(tmp_path / "local")
    assert (tmp_path / "out.refused.csv").exists()
    assert place(f"{s3}/in").fs.find("bucket/in") == before
    assert verify(f"{s3}/out").problems == ()
    gone = place(f"{s3}/out") / report.manifest.shards[0].name
    gone.unlink()
    assert pack(records, f"{s3}/out", settings=SETTINGS, salt=salt).written == 1
    assert gone.read_bytes() == remote[gone.name]


def test_a_damaged_shard_is_packed_again_alone(phantom_records, salt, tmp_path):
    out = tmp_path / "out"
    pack(phantom_records, out, settings=SETTINGS, salt=salt)
    before = contents(out)
    first, second, *_ = sorted(out.glob("*.tar"))
    first.write_bytes(first.read_bytes()[:-2000])
    second.unlink()
    report = pack(phantom_records, out, settings=SETTINGS, salt=salt)
    assert (report.written, report.already_packed) == (2, False)
    assert contents(out) == before


@pytest.mark.parametrize("small_disk", ["size=120k"], indirect=True)
def test_a_full_disk_stops_cleanly_and_more_room_lets_it_go_on(
    phantom_records, salt, small_disk, tmp_path
):
    with pytest.raises(DataError, match=r"No space left on device.*finished shards are kept"):
        pack(phantom_records, small_disk / "out", settings=SETTINGS, salt=salt)
    assert not list((small_disk / "out").glob("*.partial"))
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    report = pack(phantom_records, small_disk / "out", settings=SETTINGS, salt=salt)
    assert report.kept > 0
    pack(phantom_records, tmp_path / "whole", settings=SETTINGS, salt=salt)
    assert contents(small_disk / "out") == contents(tmp_path / "whole")


def test_a_folder_that_cannot_be_written_is_one_sentence(phantom_records, salt):
    with pytest.raises(DataError, match=r"packing stopped .*mend the folder's rights"):
        pack(phantom_records, "/proc/shards", settings=SETTINGS, salt=salt)


def test_a_small_set_has_sixteen_shards_and_a_large_one_no_more_than_it_needs(salt, tmp_path):
    def count(images):
        records = [
            Record(
                source="s", image_id=str(i), path="x", patient_id=str(i), labels={}, split="train"
            )
            for i in range(images)
        ]
        return len(plan(records, tmp_path, settings=PackSettings(), salt=salt))

    assert [count(n) for n in (10, 64, 65, 3200, 2048 * 20)] == [1, 1, 2, 16, 20]


@pytest.mark.slow
def test_two_nodes_write_the_same_bytes(phantom_records, salt, tmp_path, monkeypatch):
    from ray.cluster_utils import Cluster

    pack(phantom_records, tmp_path / "one", settings=SETTINGS, salt=salt)
    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        pack(phantom_records, tmp_path / "two", settings=SETTINGS, salt=salt, workers=None)
        assert verify(tmp_path / "two", workers=None).problems == ()
    finally:
        cluster.shutdown()
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.slow
def test_a_worker_that_dies_is_begun_again(phantom_records, salt, tmp_path):
    import psutil

    killed = []

    class Killer(Progress):
        """Kills the packing workers once, when the first shard is there."""

        def advance(self, count=1, note=""):
            if not killed:
                for process in psutil.Process().children(recursive=True):
                    if "pack_shard" in " ".join(process.cmdline()) or "IDLE" in process.name():
                        process.kill()
                        killed.append(process.pid)
            super().advance(count, note)

    bar = Killer("packing", 60, "images")
    settings = replace(SETTINGS, samples_per_shard=4)
    pack(phantom_records, tmp_path / "plain", settings=settings, salt=salt)
    pack(phantom_records, tmp_path / "k", settings=settings, salt=salt, workers=2, progress=bar)
    assert killed
    assert contents(tmp_path / "k") == contents(tmp_path / "plain")
