"""Exports: whole or not there, with a card that says what was recorded and nothing else."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mlvicx_dist.cli import main
from mlvicx_dist.errors import CheckpointError, DataError
from mlvicx_dist.evaluate.overlap import overlap_words
from mlvicx_dist.export import evidence
from mlvicx_dist.export.command import export
from mlvicx_dist.model.encoder import encoder_digest
from mlvicx_dist.train.weights import find_weights, load_encoder


def card(folder):
    return (folder / "README.md").read_text()


def test_the_card_says_what_was_recorded(run_dir, exported):
    text = card(exported)
    for words in (
        "Method: MLVICX",
        "Run `mine`, after 3 steps of\n8 images",
        "began with random weights",
        f"| 1,234 | nih (2,000), ours (500) | `{'ab' * 32}` |",
        "| seed | 5 |",
        "mlvicx_dist 0.1.0, torch 2.x",
        "| context gates | at levels 0, 1, 2, 3, 4 |",
        "Not evaluated.",
        "Not a medical device",
        "To be filled in by the owner",
    ):
        assert words in text, words
    assert "not recorded" not in text


@pytest.mark.parametrize(
    ("length", "words"), [({"steps": 1250}, "1,250 steps"), ({}, "10 epochs"), (None, "10 epochs")]
)
def test_the_card_says_what_length_was_asked_for(exported, tmp_path, length, words):
    """Steps rule where they are set; records of earlier versions lack the key."""
    path = exported / "config.json"
    description = json.loads(path.read_text())
    train = description["training"]["settings"]["train"]
    train["epochs"] = 10
    if length is None:
        del train["steps"]
    else:
        train |= length
    path.write_text(json.dumps(description))
    again = export(exported, tmp_path / "again").folder
    assert f"its settings ask for\n{words}. It\nbegan with" in card(again)


def test_what_was_not_recorded_is_called_so(make_run, tmp_path):
    out = export(make_run(tmp_path / "old", data=None), tmp_path / "e").folder
    assert f"| not recorded | not recorded | `{'ab' * 32}` |" in card(out)


def test_no_path_of_the_machine_is_in_it(run_dir, exported):
    for path in exported.iterdir():
        data = path.read_bytes()
        assert str(run_dir.parent).encode() not in data, path
        assert b"private-place" not in data, path


def test_an_export_of_an_export_knows_the_same(run_dir, exported, tmp_path):
    again = export(exported, tmp_path / "again").folder
    for name in ("README.md", "config.json", "encoder.safetensors"):
        assert (again / name).read_bytes() == (exported / name).read_bytes(), name
    images = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(load_encoder(again)(images), load_encoder(run_dir)(images))


def test_an_export_that_knows_nothing_says_so(exported, tmp_path):
    path = exported / "config.json"
    description = json.loads(path.read_text())
    del description["training"]
    path.write_text(json.dumps(description))
    again = export(exported, tmp_path / "again").folder
    assert "Not told by what this was exported from." in card(again)


def test_evaluations_of_other_checkpoints_are_named_and_not_shown(run_dir, tmp_path):
    run = tmp_path / "mine"
    shutil.copytree(run_dir, run)
    (run / "evaluations").mkdir()
    path = run / "evaluations" / "a.json"
    # Of the same step: of an earlier run in this folder.
    step = find_weights(run).name
    other = {"checkpoint": step, "encoder": "0" * 64, "name": "a", "probe": 0.987}
    path.write_text(json.dumps(other))
    text = card(export(run, tmp_path / "e").folder)
    assert "Not evaluated.\n\nEvaluations of other weights in this run" in text
    assert f"not shown: `a` ({step.removesuffix('.pt')})." in text
    assert "0.987" not in text
    path.write_text("{")
    with pytest.raises(DataError, match=r"a\.json: the evaluation cannot be read"):
        export(run, tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_a_card_says_what_labels_were_learned_and_no_folder(run_dir, tmp_path, monkeypatch):
    run = shutil.copytree(run_dir, tmp_path / "mine")
    (run / "evaluations").mkdir()
    digest = encoder_digest(load_encoder(run))
    overlap = {"unknown": "/data/x", "labels": {"splits": ["train"], "unknown": "/data/y"}}
    result = {"checkpoint": "c", "encoder": digest, "name": "a", "overlap": overlap}
    (run / "evaluations" / "a.json").write_text(json.dumps(result))
    monkeypatch.setattr(evidence, "summary", lambda result: [overlap_words(result["overlap"])])
    text = card(export(run, tmp_path / "e").folder)
    assert "This encoder learned the labels of" in text
    assert "/data/" not in text


def test_what_lies_beside_an_export_is_no_evaluation_of_it(exported, tmp_path):
    folder = tmp_path / "a" / "b"
    shutil.copytree(exported, folder)
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations" / "a.json").write_text("{")
    assert "Not evaluated." in card(export(folder, tmp_path / "again").folder)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_there_already_stays(run_dir, tmp_path, kind, capsys):
    out = tmp_path / "out"
    mine = out
    if kind == "folder":
        out.mkdir()
        mine = out / "mine.txt"
    mine.write_text("mine")
    assert main(["export", str(run_dir), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert f"{out}: something is there already" in error
    assert len(error.strip().splitlines()) == 1
    assert mine.read_text() == "mine"


def test_an_empty_folder_is_taken(run_dir, tmp_path, capsys):
    assert main(["export", str(run_dir), "--out", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told["files"]) == {path.name for path in tmp_path.iterdir()}
    assert [path.name for path in tmp_path.parent.glob(".*.partial")] == []


def without(folder, key):
    weights = load_file(folder / "encoder.safetensors")
    del weights[key]
    save_file(weights, folder / "encoder.safetensors")


def with_more(folder):
    weights = load_file(folder / "encoder.safetensors")
    save_file({**weights, "more": torch.zeros(1)}, folder / "encoder.safetensors")


def cut_short(folder):
    path = folder / "encoder.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def changed(folder, **model):
    path = folder / "config.json"
    description = json.loads(path.read_text())
    description["model"] |= model
    path.write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda e: without(e, "backbone.gates.3.spatial.weight"), "gates.3.spatial.weight is miss"),
        (with_more, "more is extra"),
        (cut_short, "it is no whole export"),
        (lambda e: (e / "encoder.safetensors").write_bytes(b""), "it is no whole export"),
        (lambda e: (e / "config.json").unlink(), "config.json is missing"),
        (lambda e: (e / "config.json").write_text("[]"), "config.json holds no settings"),
        (lambda e: (e / "config.json").write_text("{}"), "config.json has no 'model'"),
        (lambda e: changed(e, context=False), "gates.0.excite.weight is extra"),
        (lambda e: changed(e, newer=1), "not known to this version (model.newer"),
    ],
)
def test_a_damaged_export_is_one_sentence(exported, tmp_path, damage, words, capsys):
    damage(exported)
    out = tmp_path / "again"
    assert main(["export", str(exported), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert str(exported) in error
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert not out.exists()


@pytest.mark.parametrize("small_disk", ["size=1m"], indirect=True)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(run_dir, small_disk, capsys):
    assert main(["export", str(run_dir), "--out", str(small_disk / "out")]) == 2
    error = capsys.readouterr().err
    assert "out: the export cannot be written (No space left on device" in error
    assert len(error.strip().splitlines()) == 1
    assert list(small_disk.iterdir()) == []


def test_an_export_may_lie_in_a_store(run_dir, s3, tmp_path):
    out = export(run_dir, f"{s3}/exports/one").folder
    images = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(load_encoder(out)(images), load_encoder(run_dir)(images))
    with pytest.raises(CheckpointError, match="something is there already"):
        export(run_dir, f"{s3}/exports/one")


def test_a_radiograph_is_prepared_as_evaluation_shows_it(run_dir):
    from mlvicx_dist.stream.whole import squared

    encoder = load_encoder(run_dir)
    deep = np.arange(40 * 30, dtype=np.uint16).reshape(40, 30) * 50
    image = encoder.prepare(deep)
    assert image.shape == (1, 1, 32, 32)
    assert image.dtype == torch.uint8
    assert np.array_equal(image[0, 0], squared((deep >> 8).astype(np.uint8), 32))
    assert torch.equal(encoder.prepare((deep >> 8).astype(np.uint8)), image)


def test_the_five_lines_of_the_page_run(run_dir, phantom_files, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    lines = page.split("From a DICOM file")[1].split("\n\n")[1].splitlines()
    assert len(lines) == 5
    monkeypatch.chdir(tmp_path)
    export(run_dir, "exports/mine")
    shutil.copy(next(phantom_files.rglob("*.dcm")), "chest.dcm")
    names = {}
    exec("\n".join(line.strip() for line in lines), names)
    assert names["embedding"].shape == (1, 96)
    assert names["embedding"].isfinite().all()
