"""Copies of one image in two splits are found, reported, and dropped when asked."""

import csv
import io
import json
from dataclasses import replace
from itertools import combinations
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mlvicx_dist.cli import main
from mlvicx_dist.errors import DataError, TooManyRefusedError
from mlvicx_dist.ingest import pack as packing
from mlvicx_dist.ingest.leaks import Hashed, find_leaks
from mlvicx_dist.ingest.pack import pack
from mlvicx_dist.ingest.phash import NEAR_BITS, as_words, near_pairs, perceptual_hash
from mlvicx_dist.ingest.record import Record
from mlvicx_dist.ingest.shard_task import PackSettings
from mlvicx_dist.ingest.shards import read_manifest
from mlvicx_dist.ingest.sources.anatomy import draw_phantom
from mlvicx_dist.ingest.verify import verify


def phantom(index, size_px=128):
    return Image.fromarray((draw_phantom(7, index, size_px=size_px).pixels >> 4).astype(np.uint8))


def jpeg(image, quality):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def bits(one, other):
    words = as_words([one, other])
    return int(np.bitwise_count(words[0] ^ words[1]).sum())


def test_a_copy_is_near_and_another_patient_is_far():
    pictures = [phantom(i) for i in range(24)]
    hashes = [perceptual_hash(picture) for picture in pictures]
    for picture, own in zip(pictures, hashes, strict=True):
        assert bits(own, perceptual_hash(jpeg(picture, 75))) <= 12
        assert bits(own, perceptual_hash(picture.resize((96, 96)))) <= NEAR_BITS
        assert bits(own, perceptual_hash(picture.point(lambda v: min(v * 1.15, 255)))) <= NEAR_BITS
    assert min(bits(a, b) for a, b in combinations(hashes, 2)) > NEAR_BITS + 6


@pytest.mark.parametrize("damaged", ["z" * 64, "0" * 62, "", None])
def test_a_damaged_hash_is_one_sentence(damaged):
    with pytest.raises(DataError, match="a perceptual hash is damaged; run 'mlvicx verify'"):
        as_words(["0" * 64, damaged])
    # Of the right length together.
    with pytest.raises(DataError, match="a perceptual hash is damaged"):
        as_words(["0" * 60, "0" * 68])


@given(st.integers(2, 30), st.integers(0, 15), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_every_pair_within_fifteen_bits_is_found(count, distance, seed):
    rng = np.random.default_rng(seed)
    flat = rng.integers(0, 2, (count, 256)).astype(bool)
    flat[count // 2 :] = flat[: count - count // 2]
    for row in flat[count // 2 :]:
        row[rng.choice(256, distance, replace=False)] ^= True
    words = as_words([np.packbits(row).tobytes().hex() for row in flat])
    groups = rng.integers(0, 3, count)
    pairs, distances = near_pairs(words, groups, bits=15)
    expected = {
        (i, j): int((flat[i] != flat[j]).sum())
        for i, j in combinations(range(count), 2)
        if groups[i] != groups[j] and (flat[i] != flat[j]).sum() <= 15
    }
    found = dict(zip(map(tuple, pairs.tolist()), distances.tolist(), strict=True))
    assert found == expected


@pytest.fixture
def images(tmp_path):
    """Twelve patients; the image of number 3 comes again, re-encoded, as patient 11's."""
    records = []
    for number in range(12):
        path = tmp_path / f"{number}.png"
        picture = phantom(3 if number == 11 else number)
        (jpeg(picture, 90) if number == 11 else picture).save(path)
        split = "test" if number >= 9 else "val" if number >= 7 else "train"
        records.append(
            Record(
                source="s",
                image_id=str(number),
                path=str(path),
                patient_id=str(number),
                labels={},
                split=split,
            )
        )
    return records


def test_a_copy_in_two_splits_stops_the_packing_with_a_report(images, salt, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"1 pairs .* \(1 in train and test\).*out.leaks.csv"):
        pack(images, out, settings=PackSettings(), salt=salt)
    assert not (out / "manifest.json").exists()
    (row,) = csv.DictReader((tmp_path / "out.leaks.csv").open())
    assert (row["first_split"], row["second_split"]) == ("train", "test")
    assert int(row["bits"]) <= 24
    assert {row["first_where"], row["second_where"]} == {images[3].path, images[11].path}
    assert (tmp_path / "out.leaks.csv").stat().st_mode & 0o777 == 0o600


def test_dropping_leaves_the_earlier_one_out_and_mends_to_the_same_bytes(images, salt, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(DataError):
        pack(images, out, settings=PackSettings(), salt=salt)
    drop = PackSettings(near_duplicates="drop")
    report = pack(images, out, settings=drop, salt=salt, max_refused=0.2)
    assert report.kept == 3  # what the first start packed is taken over
    assert report.reasons() == {"near-duplicate": 1}
    assert report.manifest.splits == {"test": 3, "train": 6, "val": 2}
    shard = next(p for p in out.glob("train*.tar"))
    before = shard.read_bytes()
    shard.unlink()
    again = pack(images, out, settings=drop, salt=salt, max_refused=0.2)
    assert (again.written, shard.read_bytes()) == (1, before)
    assert verify(out).leaks == ()


@pytest.mark.parametrize(
    ("one", "other", "first"),
    [("train", "val", "train"), ("validate", "train", "train"), ("validate", "test", "validate")],
)
@pytest.mark.parametrize("keys", ["ab", "ba"])
def test_what_is_held_out_is_the_later_of_two_copies(one, other, first, keys):
    pair = [
        Hashed(key * 32, split, "0" * 64) for split, key in zip((one, other), keys, strict=True)
    ]
    (leak,) = find_leaks(pair)
    assert leak.first.split == first


def test_a_copy_that_was_dropped_stays_out_when_its_shard_is_packed_again(images, salt, tmp_path):
    drop = PackSettings(near_duplicates="drop")
    mended = tmp_path / "10.png"
    mended.write_bytes(b"not an image")
    with pytest.raises(TooManyRefusedError):
        pack(images, tmp_path / "out", settings=drop, salt=salt)
    # What was mended is a copy too, of another image in the shard of the one that was dropped.
    jpeg(phantom(5), 90).save(mended)
    report = pack(images, tmp_path / "out", settings=drop, salt=salt)
    assert report.reasons() == {"near-duplicate": 2}
    assert report.manifest.splits == {"test": 3, "train": 5, "val": 2}
    assert verify(tmp_path / "out").leaks == ()


def test_a_mode_that_keeps_copies_brings_dropped_ones_back(images, salt, tmp_path):
    drop = PackSettings(near_duplicates="drop")
    allow = PackSettings(near_duplicates="allow")
    with patch.object(packing, "write_manifest", side_effect=OSError(28, "No space")):
        with pytest.raises(DataError):
            pack(images, tmp_path / "out", settings=drop, salt=salt)
    report = pack(images, tmp_path / "out", settings=allow, salt=salt)
    assert sum(report.manifest.splits.values()) == 12
    pack(images, tmp_path / "clean", settings=allow, salt=salt)
    for shard in (tmp_path / "clean").glob("*.tar"):
        assert shard.read_bytes() == (tmp_path / "out" / shard.name).read_bytes()


def test_a_patient_in_two_splits_of_two_folders_is_found(images, salt, tmp_path):
    pack(images[:3], tmp_path / "a", settings=PackSettings(), salt=salt)
    again = [
        replace(r, image_id=f"b{r.image_id}", patient_id="1", split="test") for r in images[4:6]
    ]
    pack(again, tmp_path / "b", settings=PackSettings(), salt=salt)
    (problem,) = verify(tmp_path / "b", against=[tmp_path / "a"]).problems
    assert "1 patients are in two splits" in problem
    pack(again, tmp_path / "c", settings=PackSettings(), salt=b"\x02" * 32)
    verdict = verify(tmp_path / "c", against=[tmp_path / "a"])
    assert verdict.problems == ()
    assert "another salt" in verdict.notes[0]
    renamed = [replace(record, source="t") for record in again]
    pack(renamed, tmp_path / "d", settings=PackSettings(), salt=salt)
    verdict = verify(tmp_path / "d", against=[tmp_path / "a"])
    assert not any("patients" in problem for problem in verdict.problems)
    assert "packed under another --name (s)" in verdict.notes[0]
    next((tmp_path / "a").glob("*.tar")).unlink()
    with pytest.raises(DataError, match="the shard cannot be read"):
        verify(tmp_path / "b", against=[tmp_path / "a"])


def test_allowing_keeps_both_and_verify_says_so(images, salt, tmp_path, capsys):
    allow = PackSettings(near_duplicates="allow")
    pack(images, tmp_path / "out", settings=allow, salt=salt)
    assert main(["verify", str(tmp_path / "out"), "--workers", "1", "--json"]) == 1
    (leak,) = json.loads(capsys.readouterr().out)["leaks"]
    assert {leak["first"]["split"], leak["second"]["split"]} == {"train", "test"}
    drop = PackSettings(near_duplicates="drop")
    with pytest.raises(DataError, match="packed with --near-duplicates allow"):
        pack(images, tmp_path / "out", settings=drop, salt=salt)


def test_test_images_that_another_set_was_trained_on_are_found(images, salt, tmp_path, capsys):
    for name, chosen in (("nih", images[:7]), ("rsna", images[7:])):
        pack(chosen, tmp_path / name, settings=PackSettings(), salt=salt)
        assert main(["verify", str(tmp_path / name), "--workers", "1"]) == 0
    command = ["verify", str(tmp_path / "rsna"), "--against", str(tmp_path / "nih")]
    assert main([*command, "--workers", "1"]) == 1
    out = capsys.readouterr().out
    assert "1 pairs are copies of one image in two splits" in out
    nih = read_manifest(tmp_path / "nih")
    assert f"{nih.folder} train" in out


@pytest.mark.shared_data
def test_real_radiographs_and_their_full_size_originals(shared_data):
    folder = shared_data / "cxr"
    for path in sorted((folder / "images_fullres").glob("*.png")):
        original = Image.open(path).convert("L")
        stored = jpeg(original.resize((256, 256), Image.Resampling.LANCZOS), 95)
        assert bits(perceptual_hash(original), perceptual_hash(stored)) <= 12
    small = sorted((folder / "images").glob("nih_*"))[:300]
    hashes = [perceptual_hash(Image.open(path)) for path in small]
    words = as_words(hashes)
    pairs, _ = near_pairs(words, np.arange(len(words)))
    assert len(pairs) <= 3
