"""The demo, as a user runs it."""

import json
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest
from typed import MLVICX, run

from mlvicx_dist import cli, demo
from mlvicx_dist.train.launch import Outcome


@pytest.mark.parametrize("stopped_by", [signal.SIGTERM, signal.SIGINT])
def test_a_demo_that_is_stopped_ends_as_a_command_that_is(tmp_path, monkeypatch, stopped_by):
    given = []

    def stopped(config):
        given.append(config.run.storage_path)
        return Outcome(tmp_path, 3, stopped_by=stopped_by)

    monkeypatch.setattr(demo, "ray_session", lambda *_, **__: nullcontext())
    monkeypatch.setattr(demo, "_shard", lambda out: out.mkdir())
    monkeypatch.setattr(demo, "pretrain", stopped)
    # A name that YAML would take for more than a name.
    out = tmp_path / "my demo, [1]: a #2 \U0001fa7b"
    assert cli.main(["demo", "--out", str(out)]) == 128 + stopped_by
    assert given == [str(out)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_shows_that_pretraining_helps(tmp_path):
    out = str(tmp_path / "my demo, [1]: a #2")
    done = run(*MLVICX, "demo", "--out", out, "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["difference"]["value"] >= 0.03
    assert result["difference"]["low"] > 0
    assert Path(result["report"]).stat().st_size > 1e6
    again = run(*MLVICX, "demo", "--out", out, "--json")
    assert again.returncode == 0
    # Nothing is trained again.
    assert json.loads(again.stdout)["seconds"] < result["seconds"] / 4
