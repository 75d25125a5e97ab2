"""Checkpoints beside the training: a copy of a step, whole or not there, and a run that goes on."""

import os
import tempfile
import threading
import time

import pytest
import torch
from group import settings

from mlvicx_dist.config import parse_config
from mlvicx_dist.errors import CheckpointError, DataError, TrainingError
from mlvicx_dist.model.mlvicx import build_model
from mlvicx_dist.storage import place
from mlvicx_dist.train import saver as saver_module
from mlvicx_dist.train.checkpoint import local_copy, newest_checkpoint, read_checkpoint
from mlvicx_dist.train.optim import make_optimizer
from mlvicx_dist.train.saver import Saver
from mlvicx_dist.train.weights import load_encoder


class Bench:
    """A model, its optimizer and a saver, and what the saver said."""

    def __init__(self, run_dir, *, since_export=0, **changes):
        tree = settings("/nowhere", run_dir, **changes)
        self.config = parse_config(tree, "test")
        self.run_dir = run_dir
        self.model = build_model(self.config.model, 0)
        self.optimizer = make_optimizer(self.model, self.config.train)
        self.said = []
        self.saver = Saver(
            self.config,
            run_dir,
            self.model,
            self.optimizer,
            [{"manifest": "digest"}],
            since_export=since_export,
            say=self.said.append,
            before=lambda: None,
        )

    def step(self):
        """Move every weight."""
        loss = sum(p.sum() for p in self.model.parameters())
        self.optimizer.zero_grad()
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = 0.01
        self.optimizer.step()

    def weights(self):
        return {name: w.clone() for name, w in self.model.state_dict().items()}


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path / "run")


def saved(run_dir):
    return read_checkpoint(local_copy(newest_checkpoint(run_dir)))


def test_what_is_saved_is_the_state_of_its_step_whatever_happens_next(bench):
    bench.step()
    expected = bench.weights()
    bench.saver.save(5)
    for _ in range(3):
        bench.step()
    bench.saver.look(wait=True)
    state = saved(bench.run_dir)
    assert state["step"] == 5
    assert all(torch.equal(state["model"][name], expected[name]) for name in expected)
    moments = state["optimizer"]["state"]
    assert {float(m["step"]) for m in moments.values()} == {1.0}
    bench.saver.save(8)
    bench.saver.look(wait=True)
    now = bench.weights()
    assert all(torch.equal(saved(bench.run_dir)["model"][name], now[name]) for name in now)


def test_it_is_due_by_step_and_by_time_but_not_while_one_is_being_written(tmp_path):
    bench = Bench(tmp_path / "run", checkpoint__every_steps=4, checkpoint__every_s=0.05)
    held = threading.Event()
    bench.saver.before = held.wait
    threading.Event().wait(0.06)
    assert bench.saver.due(1)
    bench.saver.save(1)
    threading.Event().wait(0.06)
    assert not bench.saver.due(2)
    assert not bench.saver.due(4)
    held.set()
    bench.saver.look(wait=True)
    bench.saver._next_s += 1000
    assert bench.saver.due(5), "what step 4 was owed"
    bench.saver.save(5)
    bench.saver.look(wait=True)
    bench.saver._next_s += 1000
    assert not bench.saver.due(6)


def test_weights_that_are_not_finite_are_not_saved(bench):
    bench.saver.save(1)
    bench.saver.look(wait=True)
    with torch.no_grad():
        next(bench.model.parameters()).view(-1)[0] = float("nan")
    bench.saver.save(2)
    with pytest.raises(TrainingError, match="step 2: the weights are not finite"):
        bench.saver.look(wait=True)
    assert saved(bench.run_dir)["step"] == 1


def test_the_export_is_that_of_the_checkpoint(bench):
    bench.step()
    bench.saver.finish(3, final=True)
    images = torch.rand(2, 1, 32, 32)
    exported = load_encoder(bench.run_dir / "exports" / "step-00000003")
    assert torch.equal(exported(images), load_encoder(bench.run_dir)(images))


def test_every_third_checkpoint_has_an_export_over_starts_and_failures(tmp_path, monkeypatch):
    def save(bench, step):
        bench.saver.save(step)
        bench.saver.look(wait=True)

    def exports():
        folder = tmp_path / "run" / "exports"
        return sorted(int(path.name[5:]) for path in folder.glob("step-*"))

    bench = Bench(tmp_path / "run", checkpoint__export_every=3)
    for step in (1, 2):
        save(bench, step)
    since = saved(bench.run_dir)["since_export"]
    again = Bench(tmp_path / "run", checkpoint__export_every=3, since_export=since)
    written = saver_module.save_export

    def fails(*args, **options):
        raise CheckpointError("no room.")

    monkeypatch.setattr(saver_module, "save_export", fails)
    save(again, 3)
    assert (exports(), again.saver.failing) == ([], True)
    monkeypatch.setattr(saver_module, "save_export", written)
    for step in (4, 5, 6, 7):
        save(again, step)
    assert (exports(), again.saver.failing) == ([4, 7], False)


@pytest.mark.parametrize("small_disk", ["size=8m"], indirect=True)
def test_a_full_disk_stops_nothing_and_what_was_there_stays(small_disk):
    bench = Bench(small_disk / "run")
    bench.saver.save(1)
    bench.saver.look(wait=True)
    used = (small_disk / "run" / "checkpoints" / "step-00000001.pt").stat().st_size
    (small_disk / "filler").write_bytes(b"\0" * (8 * 2**20 - used - 2**16))
    bench.saver.save(2)
    bench.saver.look(wait=True)
    assert "cannot be written (No space left on device)" in bench.said[0]
    assert "Training goes on" in bench.said[0]
    assert saved(small_disk / "run")["step"] == 1
    assert [p.name for p in (small_disk / "run" / "checkpoints").glob(".*")] == []
    (small_disk / "filler").unlink()
    bench.saver.save(3)
    bench.saver.look(wait=True)
    assert bench.said[1:] == []
    assert saved(small_disk / "run")["step"] == 3


def test_the_last_checkpoint_is_tried_again_before_the_run_gives_up(bench, monkeypatch):
    failures = iter([CheckpointError("no room."), CheckpointError("no room.")])

    def save(*arguments, **options):
        for error in failures:
            raise error
        return real(*arguments, **options)

    real = saver_module.save_checkpoint
    monkeypatch.setattr(saver_module, "save_checkpoint", save)
    monkeypatch.setattr(saver_module.time, "sleep", lambda seconds: None)
    bench.saver.finish(3, final=False)
    assert len(bench.said) == 2
    assert saved(bench.run_dir)["step"] == 3
    bench.saver._patience_s = 0.0
    failures = iter([CheckpointError("no room.")])
    with pytest.raises(CheckpointError):
        bench.saver.finish(4, final=False)


def test_a_new_driver_clears_what_a_killed_one_left_half_written(bench, tmp_path):
    folder = bench.run_dir / "checkpoints"
    folder.mkdir(parents=True)
    (folder / ".step-00000009.pt.123.partial").write_bytes(b"x")
    Bench(bench.run_dir)
    assert list(folder.iterdir()) == []


def test_a_store_that_is_lost_and_regained(s3_server, monkeypatch):
    bench = Bench(place(f"{s3_server.bucket}/run"))
    bench.saver.save(1)
    bench.saver.look(wait=True)
    s3_server.stop()
    bench.step()
    bench.saver.save(2)
    bench.saver.look(wait=True)
    assert "cannot be written" in bench.said[0]
    s3_server.start()
    assert saved(bench.run_dir)["step"] == 1
    bench.saver.finish(3, final=True)
    assert saved(bench.run_dir)["step"] == 3
    images = torch.rand(2, 1, 32, 32)
    remote = load_encoder(f"{s3_server.bucket}/run")
    exported = load_encoder(f"{s3_server.bucket}/run/exports/step-00000003")
    assert torch.equal(remote(images), exported(images))
    for step in (4, 5, 6):
        bench.saver.finish(step, final=False)
    names = sorted(p.name for p in (bench.run_dir / "checkpoints").iterdir())
    assert names == [f"step-{s:08d}.{e}" for s in (4, 5, 6) for e in ("json", "pt")]


def test_a_remote_checkpoint_that_is_damaged_is_passed_over(s3_server, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    bench = Bench(place(f"{s3_server.bucket}/run"))
    for step in (1, 2):
        bench.saver.finish(step, final=False)
    newest = newest_checkpoint(bench.run_dir)
    newest.write_bytes(newest.read_bytes()[:-10])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "another node"))
    said = []
    assert newest_checkpoint(bench.run_dir, said.append).name == "step-00000001.pt"
    assert "is damaged" in said[0]


def test_copies_that_nobody_asks_for_do_not_stay(s3_server, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    runs = [place(f"{s3_server.bucket}/run{k}") for k in range(3)]
    for run_dir in runs:
        Bench(run_dir).saver.finish(1, final=False)
    copies = [local_copy(newest_checkpoint(run_dir)) for run_dir in runs[:2]]
    week_ago_s = time.time() - 8 * 86400
    os.utime(copies[0].parent, (week_ago_s, week_ago_s))
    local_copy(newest_checkpoint(runs[2]))
    assert [copy.exists() for copy in copies] == [False, True]


def test_a_remote_export_that_cannot_be_had_is_one_sentence(s3, tmp_path, monkeypatch):
    bench = Bench(place(f"{s3}/run"))
    bench.saver.finish(1, final=True)
    folder = f"{s3}/run/exports/step-00000001"
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot be made \(Not a dir"):
        load_encoder(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (place(folder) / "config.json").unlink()
    with pytest.raises(CheckpointError, match="no whole export"):
        load_encoder(folder)


@pytest.mark.parametrize("small_disk", ["size=64k"], indirect=True)
def test_a_full_disk_here_is_not_blamed_on_the_store(s3_server, small_disk, monkeypatch):
    bench = Bench(place(f"{s3_server.bucket}/run"))
    bench.saver.finish(1, final=True)
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    for what in ("run", "run/exports/step-00000001"):
        with pytest.raises(CheckpointError, match=r"no copy of s3://.* can be written \(No space"):
            load_encoder(f"{s3_server.bucket}/{what}")
