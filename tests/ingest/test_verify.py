"""`verify` finds each kind of damage and says how it is mended."""

import http.server
import io
import json
import shutil
import tarfile
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from mlvicx_dist.cli import main
from mlvicx_dist.ingest.shards import index_path, read_manifest, write_manifest, write_shard
from mlvicx_dist.ingest.verify import verify

_BUFFER = io.BytesIO()
Image.new("L", (8, 8)).save(_BUFFER, "PNG")
PNG = _BUFFER.getvalue()


@pytest.fixture
def shards(phantom_shards, tmp_path):
    return shutil.copytree(phantom_shards, tmp_path / "shards")


def first(shards):
    return shards / read_manifest(shards).shards[0].name


def test_a_whole_folder_is_whole(shards, capsys):
    assert main(["verify", "--workers", "1", str(shards), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["samples"] == 60
    assert document["problems"] == []


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-9000]), "SHA-256"),
        (lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), "SHA-256"),
        (lambda p: p.unlink(), "missing"),
        (lambda p: (p.unlink(), p.mkdir()), "the shard cannot be read (Is a directory)"),
        (lambda p: index_path(p).write_bytes(b"x"), "index is missing or damaged"),
        (lambda p: p.with_name("train-999999.tar").write_bytes(b""), "does not name"),
    ],
)
def test_damage_is_named_with_the_way_out(shards, damage, words, capsys):
    damage(first(shards))
    assert main(["verify", "--workers", "1", str(shards)]) == 1
    out = capsys.readouterr().out
    assert words in out
    assert "run the same sharding command again" in out


def test_a_flipped_byte_in_an_image_is_found(shards):
    path = first(shards)
    data = bytearray(path.read_bytes())
    data[600:900] = bytes(300)
    path.write_bytes(data)
    assert any("SHA-256" in problem for problem in verify(shards).problems)


def rewritten(shards, change):
    """The first shard again, its samples changed, under a manifest that agrees with it."""
    manifest = read_manifest(shards)
    info = manifest.shards[0]
    samples = list(webdataset.WebDataset(str(shards / info.name), shardshuffle=False))
    for sample in samples:
        for name in [n for n in sample if n.startswith("__") and n != "__key__"]:
            del sample[name]
    change(samples[0])
    new = write_shard(shards / info.name, samples, split=info.split)
    write_manifest(replace(manifest, shards=(new, *manifest.shards[1:])))


def with_json(**values):
    def change(sample):
        sample["json"] = json.dumps({**json.loads(sample["json"]), **values}).encode()

    return change


def with_exif(sample):
    picture = Image.open(io.BytesIO(sample["jpg"]))
    exif = Image.Exif()
    exif[0x010E] = "Jane Doe"
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", exif=exif)
    sample["jpg"] = buffer.getvalue()


def with_segment(segment):
    def change(sample):
        sample["jpg"] = sample["jpg"][:2] + segment + sample["jpg"][2:]

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_json(name="Jane Doe"), "the key name may not be in a shard"),
        (with_json(patient="Jane Doe"), "this patient may not be"),
        (with_json(view="PA Jane Doe"), "this view may not be"),
        (with_json(age=94), "this age may not be"),
        (with_json(sex="Jane"), "this sex may not be"),
        (with_json(labels={"nodule": "Jane"}), "this labels may not be"),
        (with_json(boxes=[{"label": "nodule", "left": "Jane"}]), "this boxes may not be"),
        (with_json(phash="Jane"), "this phash may not be"),
        (with_json(split="holdout"), "another split than its shard's"),
        (with_json(source="Jane Doe"), "a source that the manifest does not name"),
        (with_json(labels={"Jane Doe": 1}), "a class that the manifest does not name"),
        (with_exif, "its image carries FFE1"),
        (with_segment(b"\xff\xe9\x00\x0aJane Doe"), "its image carries FFE9"),
        (with_segment(b"\xff\xe0\x00\x0aJane Doe"), "its image carries FFE0 of 10 bytes"),
        (lambda s: s.update(jpg=s["jpg"] + b"Jane Doe"), "8 bytes after its end"),
        (
            lambda s: s.update(json=s["json"].replace(b"{", b'{"view": "Jane", ', 1)),
            "JSON is damaged",
        ),
        (lambda s: s.update(__key__="Jane-Doe"), "its key is not 32 hexadecimal digits"),
        (lambda s: s.update(json=b"{}"), "its JSON is damaged"),
        (lambda s: s.update({"mask.png": PNG}), "its mask is not of the size of its image"),
    ],
)
def test_what_may_name_a_patient_is_found(shards, change, words):
    rewritten(shards, change)
    (problem,) = verify(shards).problems
    assert words in problem
    assert "Jane" not in problem or "Jane-Doe" in problem


@pytest.mark.parametrize("name", ["dir/key.jpg", "key.txt", "key.dcm", "k" * 40 + ".jpg", "é.jpg"])
def test_a_member_that_is_none_of_ours_is_refused(shards, name):
    with tarfile.open(first(shards), "a") as tar:
        for each in (name, str(Path(name).with_suffix(".json"))):
            info = tarfile.TarInfo(each)
            info.uname = info.gname = "root"
            tar.addfile(info, io.BytesIO())
    assert any(f"{name} does not belong in a shard" in p for p in verify(shards).problems)


def test_a_tar_that_tells_of_an_owner_or_holds_a_member_twice_is_refused(shards):
    for owner, words in (("jane", "does not belong"), ("root", "stands twice")):
        path = first(shards)
        with tarfile.open(path) as tar:
            name = tar.getnames()[0] if owner == "root" else "a" * 32 + ".json"
        whole = path.read_bytes()
        with tarfile.open(path, "a") as tar:
            info = tarfile.TarInfo(name)
            info.uname = info.gname = owner
            tar.addfile(info, io.BytesIO())
        assert any(words in p for p in verify(shards).problems)
        path.write_bytes(whole)


def test_many_workers_say_the_same_as_one(shards):
    first(shards).write_bytes(b"")
    assert verify(shards, workers=2) == verify(shards)


class Unlisted(http.server.SimpleHTTPRequestHandler):
    """A folder over http with ranges, which is not listed."""

    code = 403

    def log_message(self, *args):
        pass

    def list_directory(self, path):
        self.send_error(self.code)

    def do_GET(self):
        path, wanted = Path(self.translate_path(self.path)), self.headers.get("Range")
        if not wanted:
            super().do_GET()
            return
        begin, end = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
        data = path.read_bytes()[begin : end + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.mark.parametrize(("code", "why"), [(403, "403"), (404, "in no list")])
def test_a_server_that_lists_nothing_is_told(shards, monkeypatch, code, why):
    monkeypatch.setattr(Unlisted, "code", code)
    handler = partial(Unlisted, directory=str(shards))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        verdict = verify(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert verdict.problems == ()
    assert verdict.samples == 60
    (note,) = verdict.notes
    assert "cannot be listed (" in note
    assert why in note
    assert note in verdict.lines()
