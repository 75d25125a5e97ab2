"""The log of a run: cut where it goes on, published with checkpoints, patient with a full disk."""

import errno

import pytest

from mlvicx_dist.errors import DataError
from mlvicx_dist.storage import place
from mlvicx_dist.train.runlog import RunLog, read_rows


def steps(folder):
    return [row["step"] for row in read_rows(folder / "metrics.jsonl")]


def test_rows_past_the_step_it_goes_on_from_are_cut(tmp_path):
    with RunLog(tmp_path, step=0) as log:
        for step in (1, 2, 3):
            log.write({"step": step, "loss": 1.0})
    with RunLog(tmp_path, step=2) as log:
        log.write({"step": 3, "loss": 2.0})
    assert steps(tmp_path) == [1, 2, 3]
    assert read_rows(tmp_path / "metrics.jsonl")[-1]["loss"] == 2.0
    assert list((tmp_path / "tensorboard").iterdir())


def test_rows_that_are_none_are_left_out_with_a_warning(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n[2]\n{"loss": 1.0}\n{"step": 3, "lo')
    assert read_rows(path) == [{"step": 1}]
    assert [r.getMessage() for r in caplog.records] == [
        f"{path}: left out a row that is cut short"
    ] * 3


def test_a_log_that_cannot_be_read_is_one_sentence(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.mkdir()
    with pytest.raises(DataError, match=r"metrics.jsonl: the file cannot be read \(Is a directory"):
        read_rows(path)
    with RunLog(tmp_path, step=1) as log, pytest.raises(OSError, match="Is a directory"):
        log.write({"step": 2})


def test_a_remote_run_has_its_log_when_it_is_published(s3):
    run = place(f"{s3}/run")
    with RunLog(run, step=0) as log:
        log.write({"step": 1, "loss": 1.0})
        log.publish()
    with RunLog(run, step=1) as log:
        log.write({"step": 2, "loss": 1.0})
        assert steps(run) == [1]
        log.publish()
    assert steps(run) == [1, 2]
    assert any((run / "tensorboard").iterdir())


@pytest.mark.parametrize("small_disk", ["size=64k"], indirect=True)
def test_rows_wait_for_a_disk_that_is_full(small_disk):
    with RunLog(small_disk, step=0) as log:
        log.write({"step": 1, "loss": 1.0})
        (small_disk / "filler").write_bytes(b"")
        with (
            pytest.raises(OSError, match="No space"),
            (small_disk / "filler").open("ab", 0) as file,
        ):
            while True:
                if not file.write(b"x" * 4096):
                    raise OSError("No space")
        with pytest.raises(OSError, match="No space"):
            for step in range(2, 500):
                log.write({"step": step, "loss": 1.0})
        (small_disk / "filler").unlink()
        log.write({"step": 1000, "loss": 1.0})
        found = steps(small_disk)
    assert found == [*range(1, len(found)), 1000]


def test_events_that_cannot_be_written_cost_no_row(tmp_path, monkeypatch):
    with RunLog(tmp_path, step=0) as log:
        with monkeypatch.context() as patch:
            patch.setattr(log, "_show", fail)
            for step in (1, 2):
                with pytest.raises(OSError, match="No space"):
                    log.write({"step": step, "loss": 1.0})
        log.write({"step": 3, "loss": 1.0})
    assert steps(tmp_path) == [1, 2, 3]


def test_a_row_that_a_folder_out_of_reach_holds_up_is_not_lost(tmp_path):
    def stale():
        raise OSError(errno.ESTALE, "Stale file handle")

    with RunLog(tmp_path, step=0) as log:
        with pytest.raises(OSError, match="Stale"):
            log.write({"step": 1}, fence=stale)
        assert steps(tmp_path) == []
        log.write({"step": 2}, fence=lambda: None)
    assert steps(tmp_path) == [1, 2]


def fail(row):
    raise OSError(errno.ENOSPC, "No space left on device")
