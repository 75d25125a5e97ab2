"""`mlvicx doctor` on this machine and on a cluster."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from group import settings

from mlvicx_dist.config import PretrainConfig, load_as
from mlvicx_dist.doctor import examination
from mlvicx_dist.doctor.node import Probe


def doctor(*arguments, env=None):
    done = subprocess.run(
        [sys.executable, "-m", "mlvicx_dist", "doctor", "--json", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
        timeout=240,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return (json.loads(done.stdout) if done.stdout else None), done.returncode, done.stderr


def named(document, name):
    return [finding for finding in document["findings"] if finding["name"] == name]


@pytest.fixture
def config(phantom_shards, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings(phantom_shards, tmp_path / "runs")))
    return path


def test_what_is_written_is_read_and_removed(tmp_path):
    probe = Probe()
    answer = probe.write(str(tmp_path / "runs"))
    assert answer["write_s"] > 0 and probe.sees(str(tmp_path / "runs"), answer["name"])
    assert not probe.remove(str(tmp_path / "runs"), answer["name"])
    assert list((tmp_path / "runs").iterdir()) == []
    assert not probe.sees(str(tmp_path / "runs"), answer["name"])


def test_a_store_that_deletes_nothing_is_told(tmp_path, monkeypatch):
    class Kept(Probe):
        def remove(self, folder, name):
            def refused(path, missing_ok):
                raise PermissionError(13, "Permission denied")

            monkeypatch.setattr(Path, "unlink", refused)
            return super().remove(folder, name)

    monkeypatch.setattr(
        examination._Ward,
        "_all",
        lambda ward, method, *given: ({"a": getattr(Kept(), method)(*given)}, {}),
    )
    told = list(examination._Ward({}, {})._storage(str(tmp_path / "runs")))
    assert told[0].state == "bad"
    assert "nothing can be removed (Permission denied)" in told[0].words


def test_a_store_without_credentials_is_told(monkeypatch, s3_server):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    assert "redentials" in Probe().write("s3://bucket/runs")["error"]


def test_no_worker_is_waited_for_where_none_can_be(config, monkeypatch):
    monkeypatch.setattr(examination, "slots", lambda one: 0)
    monkeypatch.setattr(examination._Ward, "_storage", lambda *given: iter(()))
    ward = examination._Ward({"here": None}, {"here": 2.0})
    found = list(ward.run(load_as(PretrainConfig, config)))
    assert [(finding.name, finding.state) for finding in found][:2] == [
        ("workers", "bad"),
        ("shards", "ok"),
    ]
    assert "room for 0" in found[0].words


def test_a_worker_that_does_not_fit_is_told(config, monkeypatch):
    monkeypatch.setattr(examination, "slots", lambda one: 2)
    monkeypatch.setattr(examination._Ward, "_storage", lambda *given: iter(()))
    ward = examination._Ward({}, {"here": 2.0})
    ward._facts = {"here": {"cpus": 2, "memory_bytes": 10**8, "gpus": []}}
    *_, last = ward.run(load_as(PretrainConfig, config))
    assert (last.name, last.state) == ("run", "bad")
    assert "where a node has 0.0 GB for it" in last.words


@pytest.mark.slow
@pytest.mark.alone
def test_one_machine_within_a_minute(config):
    began = time.monotonic()
    document, code, _ = doctor(config)
    seconds = time.monotonic() - began
    assert code == 0 and document["well"] and document["nodes"] == 1
    assert {"versions", "GPUs", "storage", "loader", "shards"} <= {
        finding["name"] for finding in document["findings"]
    }
    # The goal is 20 s on a machine that does nothing else.
    assert seconds < 60


@pytest.mark.slow
def test_what_stands_in_the_way_is_said_before_a_run(config):
    missing = ["--set", "data.shards.0.path=/dev/null/shards"]
    document, code, _ = doctor(config, "--set", "workers.num=64", *missing)
    assert code == 1 and not document["well"]
    assert "workers.num is 64" in named(document, "workers")[0]["words"]
    assert named(document, "run")[0]["state"] == "bad"


@pytest.mark.slow
def test_a_cluster_of_two(laptop, config):
    laptop.up(2, cpus=1)
    document, code, _ = doctor(config, "--set", "workers.num=2", env=laptop.env)
    assert code == 0 and document["nodes"] == 2
    assert "room for 2" in named(document, "workers")[0]["words"]
    assert "GB/s" in named(document, "exchange")[0]["words"]
    assert "million parameters" in named(document, "gradients")[0]["words"]
