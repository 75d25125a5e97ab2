"""Pretraining on Ray: two workers, kill -9, resume, finished, and a sentence for each refusal."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from small import SMALL

from mlvicx_dist.cli import main
from mlvicx_dist.config import PretrainConfig, load_as, load_config
from mlvicx_dist.errors import CheckpointError, ConfigError, DataError, ResourceError
from mlvicx_dist.ingest.shards import read_manifest
from mlvicx_dist.session import ray_session
from mlvicx_dist.storage import place
from mlvicx_dist.train import launch
from mlvicx_dist.train.checkpoint import (
    newest_checkpoint,
    read_checkpoint,
    remove_checkpoints,
    save_checkpoint,
)
from mlvicx_dist.train.owner import TOKEN, check_owner, check_shared, take_over
from mlvicx_dist.train.runlog import read_rows
from mlvicx_dist.train.weights import load_encoder

RUN = """\
kind: pretrain
run: {{name: small, storage_path: {runs}}}
data: {{shards: [{{path: {shards}}}], loader_workers: 1}}
train: {{batch_size: 6, epochs: 40, optimizer: adamw, warmup_epochs: 1, log_every_steps: 4}}
workers: {{num: 2, max_failures: 1, start_timeout_s: 60}}
checkpoint: {{every_steps: 4, keep: 2}}
"""


@pytest.fixture
def config(phantom_shards, tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(RUN.format(runs=tmp_path / "runs", shards=phantom_shards) + SMALL)
    return path


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "runs" / "small"


def command(config, *overrides):
    sets = [part for override in overrides for part in ("--set", override)]
    return [sys.executable, "-m", "mlvicx_dist", "pretrain", str(config), "--json", *sets]


def total_steps(config):
    settings = load_config(config)
    images = read_manifest(settings.data.shards[0].path).splits["train"]
    return settings.train.epochs * (images // settings.train.batch_size)


class RefusedError(Exception):
    """What a worker finds, once the run has begun."""


def refused(config, run_dir, total, *, begin, **how):
    begin("token")
    raise RefusedError


def test_settings_without_a_checkpoint_bind_nobody(config, run_dir, monkeypatch):
    monkeypatch.setattr(launch, "drive", refused)
    for overrides in (["model.init=imagenet"], ["model.init=random"], ["train.batch_size=5"]):
        with pytest.raises(RefusedError):
            launch.pretrain(load_as(PretrainConfig, config, overrides))
    save_checkpoint(run_dir, {"step": 4}, keep=2)
    with pytest.raises(CheckpointError, match=r"train.batch_size was 5 and is 6"):
        launch.pretrain(load_as(PretrainConfig, config))


def test_a_start_that_is_refused_leaves_the_record_of_the_run(config, run_dir, monkeypatch):
    monkeypatch.setattr(launch, "drive", refused)
    with pytest.raises(RefusedError):
        launch.pretrain(load_as(PretrainConfig, config))
    save_checkpoint(run_dir, {"step": 100}, keep=2)
    before = {path.name: path.read_bytes() for path in run_dir.glob("*.*")}
    shorter = load_as(PretrainConfig, config, ["train.epochs=1"])
    with pytest.raises(ConfigError, match="checkpoint is at step 100, but these settings end at"):
        launch.pretrain(shorter, accept_changes=True)
    # Nor does a run that is finished become one with other settings.
    total = total_steps(config)
    (run_dir / "state.json").write_text(json.dumps({"state": "finished", "steps": total}))
    other = load_as(PretrainConfig, config, ["loss.lambda_local=7"])
    outcome = launch.pretrain(other, accept_changes=True)
    assert (outcome.already_finished, outcome.changes) == (True, "")
    # Where its checkpoints are gone its settings bind still.
    remove_checkpoints(run_dir)
    with pytest.raises(CheckpointError, match=r"loss.lambda_local was .* and is 7"):
        launch.pretrain(other)
    (run_dir / "state.json").unlink()
    assert {path.name: path.read_bytes() for path in run_dir.glob("*.*")} == before


def ray_processes(session_of):
    """Processes of Ray that descend from a driver that is gone carry its run's folder."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/environ", "rb") as file:
                    if session_of.encode() not in file.read():
                        continue
                with open(f"/proc/{entry}/cmdline", "rb") as file:
                    found.append(f"{entry} {file.read().replace(bytes(1), b' ').decode()}")
            except OSError:
                continue
    return found


@pytest.mark.slow
def test_a_driver_that_is_killed_goes_on_and_ends(config, run_dir, tmp_path, capsys):
    """And none of its processes outlives it for long."""
    mark = f"MLVICX_TEST={tmp_path}"
    # Ray writes its processes' titles over their environment unless it is told not to.
    environment = {**os.environ, "MLVICX_TEST": str(tmp_path), "SPT_NOENV": "1"}
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(
            command(config, "train.epochs=400"), stderr=log, stdout=log, env=environment
        )
        deadline = time.monotonic() + 120
        while newest_checkpoint(run_dir) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(ray_processes(mark)) > 4
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    reached = read_checkpoint(newest_checkpoint(run_dir))["step"]
    epochs = reached // (total_steps(config) // 40) + 8
    again = command(config, f"train.epochs={epochs}")
    assert main(again[3:]) == 2
    assert f"train.epochs was 400 and is {epochs}" in capsys.readouterr().err
    result = subprocess.run(
        [*again, "--accept-changes"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    outcome = json.loads(result.stdout)
    # Workers outlive their driver by some seconds; what they did by then is not done again.
    assert outcome["resumed_from"] >= reached
    assert outcome["changes"] == f"train.epochs was 400 and is {epochs}"
    steps = [row["step"] for row in read_rows(run_dir / "metrics.jsonl")]
    assert steps == sorted(set(steps))
    assert steps[-1] == outcome["steps"] == epochs * (total_steps(config) // 40)
    assert "images/s" in result.stderr
    encoder = load_encoder(run_dir)
    exported = load_encoder(run_dir / "exports" / f"step-{outcome['steps']:08d}")
    images = torch.rand(2, 1, 32, 32)
    assert torch.equal(encoder(images), exported(images))
    assert main(again[3:]) == 0
    assert json.loads(capsys.readouterr().out)["already_finished"]
    # Ray's agents look for their raylet in turns of some seconds, so they end last.
    deadline = time.monotonic() + 180
    while ray_processes(mark) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert ray_processes(mark) == []


@pytest.fixture(scope="class")
def cluster():
    """One Ray for the tests that run in this process."""
    with ray_session({"CPU": 2}, asked="these tests", remedy="take two cores"):
        yield


@pytest.mark.usefixtures("cluster")
class TestInOneCluster:
    def test_a_worker_that_meets_a_damaged_shard_stops_the_run_in_one_sentence(
        self, config, phantom_shards, tmp_path, capsys
    ):
        shards = shutil.copytree(phantom_shards, tmp_path / "damaged")
        for shard in read_manifest(shards).shards:
            path = shards / shard.name
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert main(command(config, f"data.shards.0.path={shards}")[3:]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        last = error.strip().splitlines()[-1]
        assert re.search(r"damaged/train-\d+\.tar: .*mlvicx verify", last)

    @pytest.mark.slow
    def test_a_loss_that_is_not_finite_names_step_term_and_level(self, config, capsys):
        overrides = ["train.learning_rate_per_256=1e30", "train.warmup_epochs=0"]
        assert main(command(config, *overrides)[3:]) == 1
        error = capsys.readouterr().err
        assert "Traceback" not in error
        last = error.strip().splitlines()[-1]
        assert re.search(
            r"step \d+: the \w+ of the \w+ (term|value) is (nan|inf)", last
        ) or re.search(r"step \d+: the weights are not finite", last)


def test_a_folder_that_a_node_does_not_share_is_one_sentence(tmp_path):
    (tmp_path / TOKEN.format("there")).touch()
    check_shared(tmp_path, "there")
    with pytest.raises(DataError, match="folder is not shared by all nodes"):
        check_shared(tmp_path, "another")


@pytest.mark.parametrize("remote", [False, True])
def test_workers_that_outlive_their_driver_write_no_more(tmp_path, s3, remote):
    run_dir = place(f"{s3}/runs/new") if remote else tmp_path
    take_over(run_dir, "first")
    check_owner(run_dir, "first")
    take_over(run_dir, "second")
    check_owner(run_dir, "second")
    with pytest.raises(ResourceError, match="another process has taken this run"):
        check_owner(run_dir, "first")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.batch_size=500"], "batch of 500 is larger than the"),
        (["workers.num=64", "train.batch_size=8"], "cannot be shared by more workers"),
        (["train.batch_size=28", "views.image_size_px=2048"], "hold 14 images and need about"),
        (["workers.cpus_per_worker=500"], "asks for 1000 CPUs, but this machine has"),
        (["data.shards.0.path=/nowhere"], "/nowhere: there is no such folder of shards"),
        (["data.splits=[holdout]"], "no images of the split holdout"),
        (["model.backbone=resnet81"], "model.backbone resnet81: timm has no such model"),
        (["train.init_from=/nowhere"], "/nowhere: there is no such file or folder"),
        (["run.storage_path=/proc/x"], "folder cannot be written"),
        (["run.storage_path=ftp://x/y"], "no place that can be used"),
        (["train.batchsize=3"], "did you mean 'batch_size'?"),
    ],
)
def test_each_mistake_is_one_sentence_before_ray_starts(config, capsys, overrides, words):
    sets = [part for override in overrides for part in ("--set", override)]
    assert main(["pretrain", str(config), *sets]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
