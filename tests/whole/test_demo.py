"""The demo, as a user runs it."""

import json
from pathlib import Path

import pytest
from typed import MLVICX, run


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_shows_that_pretraining_helps(tmp_path):
    # A name that YAML would take for more than a name.
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
