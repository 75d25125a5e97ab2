"""What the loop tells of itself."""

import shutil

import pytest
import timm
import torch
from group import At, settings

from mlvicx_dist.config import parse_config
from mlvicx_dist.errors import CheckpointError, ConfigError
from mlvicx_dist.train import loop
from mlvicx_dist.train.agreement import Agreement
from mlvicx_dist.train.fingerprint import fingerprint
from mlvicx_dist.train.loop import train
from mlvicx_dist.train.metrics import Meter
from mlvicx_dist.train.notices import NoNotices, Notice
from mlvicx_dist.train.runlog import read_rows
from mlvicx_dist.train.saver import Saver
from mlvicx_dist.train.step import Member


def said_at_the_start(shards, folder, **changes):
    """What rank 0 of one worker tells before its first step."""
    (folder / "small").mkdir()
    first = []

    def enough(row):
        first.append(row)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        train(
            parse_config(settings(shards, folder, train__epochs=1, **changes), "test"),
            folder / "small",
            Member(0, 1, torch.device("cpu")),
            report=enough,
            notices=NoNotices(),
        )
    return " ".join(first[0]["said"])


@pytest.mark.parametrize(
    ("precision", "supported", "said"),
    [("bf16", False, True), ("bf16", True, False), ("float32", False, False)],
)
def test_bf16_in_software_is_told_at_the_start(
    phantom_shards, tmp_path, monkeypatch, precision, supported, said
):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    words = said_at_the_start(phantom_shards, tmp_path, train__precision=precision)
    assert ("train.precision=float32" in words) == said


def run_small(shards, folder, *, notices=None, report=lambda row: None, **changes):
    (folder / "small").mkdir(exist_ok=True)
    return train(
        parse_config(settings(shards, folder, **changes), "test"),
        folder / "small",
        Member(0, 1, torch.device("cpu")),
        report=report,
        notices=notices or NoNotices(),
    )


def test_settings_that_end_before_the_newest_checkpoint_are_refused(phantom_shards, tmp_path):
    run_small(phantom_shards, tmp_path, train__epochs=2)
    with pytest.raises(ConfigError, match=r"checkpoint is at step \d+, but these settings end at"):
        run_small(phantom_shards, tmp_path, train__epochs=1)


def test_what_is_said_after_the_last_row_is_told_at_once(phantom_shards, tmp_path, monkeypatch):
    rows = []
    finish = Saver.finish

    def slowly(saver, step, **how):
        saver.say("the disk is full")
        assert rows[-1] == {"said": ["the disk is full"], "world_size": 1}
        finish(saver, step, **how)

    monkeypatch.setattr(Saver, "finish", slowly)
    run_small(phantom_shards, tmp_path, train__epochs=1, report=rows.append)
    assert "loss" in rows[-2]


def test_a_deviation_of_one_row_is_none():
    meter = Meter(1)
    meter.add(0, {"loss": torch.tensor(1.0)}, torch.rand(1, 4))
    row = meter.row()
    assert row["loss"] == 1 and "encoder/std" not in row
    meter.add(1, {"loss": torch.tensor(1.0)}, torch.rand(1, 4))
    assert meter.row()["encoder/std"] > 0


def test_the_time_of_a_run_counts_all_its_starts(phantom_shards, tmp_path):
    run_small(phantom_shards, tmp_path, notices=At(Notice.STOP, 4))
    run_small(phantom_shards, tmp_path)
    times = [row["time_s"] for row in read_rows(tmp_path / "small" / "metrics.jsonl")]
    assert len(times) > 5
    assert times == sorted(times)


def test_a_run_that_goes_on_needs_no_more_what_it_began_with(phantom_shards, tmp_path):
    (tmp_path / "source").mkdir()
    run_small(phantom_shards, tmp_path / "source", train__epochs=1)
    source = tmp_path / "source" / "small"
    begun = {"train__init_from": str(source)}
    config = parse_config(settings(phantom_shards, tmp_path, **begun), "test")
    known = fingerprint(config, ["a"])
    run_small(phantom_shards, tmp_path, notices=At(Notice.STOP, 4), **begun)
    shutil.rmtree(source)
    assert fingerprint(config, ["a"], known) == known
    with pytest.raises(CheckpointError):
        fingerprint(config, ["a"])
    assert run_small(phantom_shards, tmp_path, **begun) > 4


def test_weights_of_imagenet_are_asked_for_once(phantom_shards, tmp_path, monkeypatch):
    made, asked = timm.create_model, []

    def create(name, **options):
        asked.append(options.pop("pretrained"))
        return made(name, **options, pretrained=False)

    monkeypatch.setattr(timm, "create_model", create)
    for notices in (At(Notice.STOP, 4), NoNotices()):
        run_small(phantom_shards, tmp_path, notices=notices, model__init="imagenet")
    # The second start has a checkpoint.
    assert asked.count(True) == 1


def test_a_group_that_could_not_save_does_not_make_way_for_a_larger_one():
    alone = Agreement(0, 1, timeout_s=1)
    assert alone.heard(At(Notice.REGROUP, 1)) is Notice.REGROUP
    assert alone.heard(At(Notice.REGROUP, 1), stay=True) is Notice.NONE
    assert alone.heard(At(Notice.STOP, 1), stay=True) is Notice.STOP


@pytest.mark.parametrize("gradients", ["float32", "bf16"])
def test_a_worker_without_others_says_that_it_exchanges_nothing(
    phantom_shards, tmp_path, gradients
):
    words = said_at_the_start(phantom_shards, tmp_path, train__gradients=gradients)
    assert ("train.gradients has no effect" in words) == (gradients == "bf16")


def test_weights_that_no_all_reduce_sees_are_aligned_once_an_epoch(
    phantom_shards, tmp_path, monkeypatch
):
    aligned = []
    monkeypatch.setattr(loop, "align", lambda model: aligned.append(model))
    run_small(phantom_shards, tmp_path, train__epochs=3)
    assert len(aligned) == 3
