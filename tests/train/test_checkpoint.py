"""Checkpoints: whole or not at all, and the one before when the newest is damaged."""

import errno
import logging

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from upath import UPath

from mlvicx_dist.errors import CheckpointError
from mlvicx_dist.train import checkpoint
from mlvicx_dist.train.checkpoint import (
    DamagedError,
    check_digest,
    local_copy,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from mlvicx_dist.train.owner import take_over
from mlvicx_dist.train.weights import find_weights


def state(step):
    return {
        "step": step,
        "model": {"w": torch.full((4,), float(step))},
        "optimizer": {},
        "settings": {},
        "manifests": [],
        "versions": {"mlvicx_dist": "0"},
    }


@pytest.fixture
def run(tmp_path):
    for step in (10, 20, 30, 40):
        save_checkpoint(tmp_path, state(step), keep=3)
    return tmp_path


def test_the_newest_are_kept(run):
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert names == [f"step-{s:08d}.{e}" for s in (20, 30, 40) for e in ("json", "pt")]
    assert read_checkpoint(newest_checkpoint(run))["step"] == 40


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-10]),
        lambda path: path.write_bytes(b"\0" * path.stat().st_size),
        lambda path: path.unlink(),
        lambda path: path.with_suffix(".json").unlink(),
        lambda path: path.with_suffix(".json").write_text("{"),
    ],
)
def test_a_damaged_one_is_passed_over(run, damage):
    damage(run / "checkpoints" / "step-00000040.pt")
    assert newest_checkpoint(run).name == "step-00000030.pt"


def test_the_passing_over_is_said(run, caplog):
    (run / "checkpoints" / "step-00000040.pt").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        newest_checkpoint(run)
    assert "step-00000040.pt: the checkpoint is damaged" in caplog.text
    assert "The checkpoint before it is taken" in caplog.text


def test_nothing_is_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    path = tmp_path / "step-00000001.pt"
    torch.save({"format": 1, "model": Evil(), "settings": {}}, path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint(path)


def test_what_is_no_checkpoint_is_one_sentence(tmp_path):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        find_weights(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        find_weights(tmp_path)
    (tmp_path / "x.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"no x\.json beside it"):
        check_digest(tmp_path / "x.pt")
    (tmp_path / "x.json").write_text('{"bytes": 2, "sha256": ""}')
    with pytest.raises(CheckpointError, match="damaged"):
        check_digest(tmp_path / "x.pt")
    torch.save({"state_dict": {}}, tmp_path / "y.pt")
    with pytest.raises(CheckpointError, match="no checkpoint of mlvicx"):
        read_checkpoint(tmp_path / "y.pt")
    newer = {**state(1), "format": 99}
    torch.save(newer, tmp_path / "z.pt")
    with pytest.raises(CheckpointError, match="newer mlvicx_dist"):
        read_checkpoint(tmp_path / "z.pt")


def test_where_none_is_whole_the_run_does_not_begin_anew_unasked(run):
    for path in (run / "checkpoints").glob("*.pt"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of its 3 checkpoints is whole"):
        newest_checkpoint(run)


def test_what_cannot_be_read_is_not_taken_for_damaged(run, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, "digest", fail)
    with pytest.raises(
        CheckpointError, match=r"00000040.pt: .* cannot be read \(Input/output error"
    ):
        newest_checkpoint(run)


def test_a_store_that_is_away_is_no_run_without_checkpoints(run, monkeypatch):
    folder = UPath("memory://mlvicx-test")
    save_checkpoint(folder, state(10), keep=3)
    assert newest_checkpoint(folder).name == "step-00000010.pt"

    def away(*args, **options):
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    # As gs:// does: its `isdir` takes every OSError for no.
    monkeypatch.setattr(MemoryFileSystem, "isdir", lambda *args: False)
    monkeypatch.setattr(MemoryFileSystem, "ls", away)
    with pytest.raises(CheckpointError, match="cannot be listed"):
        newest_checkpoint(folder, patience_s=0)
    with pytest.raises(OSError, match="unreachable"):
        take_over(folder, "token")


def test_a_remote_one_without_its_seal_is_said_to_have_none():
    folder = UPath("memory://mlvicx-unsealed")
    save_checkpoint(folder, state(10), keep=3)
    path = folder / "checkpoints" / "step-00000010.pt"
    path.with_suffix(".json").unlink()
    with pytest.raises(DamagedError, match=r"there is no step-00000010\.json beside it"):
        local_copy(path)


def test_a_run_that_went_on_from_before_drops_what_came_after(run):
    (run / "checkpoints" / "step-00000040.pt").write_bytes(b"")
    save_checkpoint(run, state(35), keep=1)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "step-00000035.json",
        "step-00000035.pt",
    ]
