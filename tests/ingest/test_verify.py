"""`verify` finds each kind of damage and says how it is mended."""

import json
import shutil

import pytest

from mlvicx_dist.cli import main
from mlvicx_dist.ingest.shards import index_path, read_manifest
from mlvicx_dist.ingest.verify import verify


@pytest.fixture
def shards(phantom_shards, tmp_path):
    return shutil.copytree(phantom_shards, tmp_path / "shards")


def first(shards):
    return shards / read_manifest(shards).shards[0].name


def test_a_whole_folder_is_whole(shards, capsys):
    assert main(["verify", str(shards), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["samples"] == 60
    assert document["problems"] == []


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-9000]), "SHA-256"),
        (lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), "SHA-256"),
        (lambda p: p.unlink(), "missing"),
        (lambda p: index_path(p).write_bytes(b"x"), "index is missing or damaged"),
        (lambda p: p.with_name("train-999999.tar").write_bytes(b""), "does not name"),
    ],
)
def test_damage_is_named_with_the_way_out(shards, damage, words, capsys):
    damage(first(shards))
    assert main(["verify", str(shards)]) == 1
    out = capsys.readouterr().out
    assert words in out
    assert "run the same sharding command again" in out


def test_a_flipped_byte_in_an_image_is_found(shards):
    path = first(shards)
    data = bytearray(path.read_bytes())
    data[600:900] = bytes(300)
    path.write_bytes(data)
    assert any("SHA-256" in problem for problem in verify(shards).problems)
