"""Packing: the same bytes always, nothing lost by a crash, nothing left out in silence."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import webdataset
from PIL import Image

from mlvicx_dist.errors import DataError, TooManyRefusedError
from mlvicx_dist.ingest.pack import PackSettings, pack
from mlvicx_dist.ingest.record import ALLOWED_KEYS, Record
from mlvicx_dist.ingest.shards import build_index, decode_image, read_index, read_manifest

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
    index = read_index(phantom_shards, shard.name)
    assert np.array_equal(index, build_index(phantom_shards / shard.name))
    data = (phantom_shards / shard.name).read_bytes()
    for row in index:
        start = row["json_offset"]
        assert json.loads(data[start : start + row["json_size"]])["split"] == shard.split


def test_one_worker_and_two_write_the_same_bytes(phantom_records, salt, tmp_path):
    one = pack(phantom_records, tmp_path / "one", settings=SETTINGS, salt=salt)
    two = pack(phantom_records[::-1], tmp_path / "two", settings=SETTINGS, salt=salt, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert one.manifest.digest == two.manifest.digest


def test_no_patient_is_named_and_none_is_in_two_splits(phantom_records, phantom_shards):
    everything = b"".join(contents(phantom_shards).values())
    for record in phantom_records:
        assert record.patient_id.encode() not in everything


def test_a_killed_packing_goes_on_and_ends_in_the_same_bytes(phantom_files, tmp_path, salt):
    (tmp_path / "salt").write_text(salt.hex())
    script = os.path.join(os.path.dirname(__file__), "../../sharding/shard_folder.py")
    command = [
        *(sys.executable, script, "--source", str(phantom_files), "--workers", "1"),
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


@pytest.fixture
def damaged(tmp_path):
    """Ten images, one of them garbage and one empty."""
    records = []
    for number in range(10):
        path = tmp_path / f"{number}.png"
        Image.fromarray(np.full((64, 64), number, np.uint8)).save(path)
        records.append(
            Record(source="s", image_id=path.name, path=path, patient_id=path.name, labels={})
        )
    (tmp_path / "3.png").write_bytes(b"not an image")
    (tmp_path / "4.png").write_bytes(b"")
    return records


def test_a_bad_image_is_skipped_counted_and_listed(damaged, salt, tmp_path):
    out = tmp_path / "out"
    report = pack(damaged, out, settings=SETTINGS, salt=salt, max_refused=0.5)
    assert report.reasons() == {"unreadable": 2}
    assert sum(report.manifest.splits.values()) == 8
    listed = (out / "refused.csv").read_text()
    assert "3.png" in listed
    assert "4.png" in listed
    assert (out / "refused.csv").stat().st_mode & 0o777 == 0o600


def test_too_many_bad_images_write_no_manifest(damaged, salt, tmp_path):
    with pytest.raises(TooManyRefusedError, match="2 of 10 files") as caught:
        pack(damaged, tmp_path / "out", settings=SETTINGS, salt=salt)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out" / "manifest.json").exists()


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
        source="s", image_id="a", path=tmp_path / "a.png", patient_id="p", labels={}, split="train"
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
