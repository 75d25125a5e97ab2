"""The tutorial, as it is typed."""

import json
import os
import re
import sys
import tempfile
from pathlib import Path

import pytest
from typed import ROOT, run

from mlvicx_dist.ingest.sources.phantom import write_phantoms

WALKED = (
    "Pack",
    "Pretrain",
    "Is it better?",
    "Hand it on",
)
SEVERAL = "Several nodes on this machine"
SHORT = f"""\
#!/bin/sh
command=$1
shift
case $command in
  pretrain | profile) exec {sys.executable} -m mlvicx_dist $command "$@" --set train.epochs=2 \\
    --set train.warmup_epochs=0 --set views.image_size_px=48 --set model.backbone=test_resnet ;;
  *) exec {sys.executable} -m mlvicx_dist "$command" "$@" ;;
esac
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_tutorial_as_it_is_typed(tmp_path, laptop):
    """What its blocks say, line by line; trainings are short, their views and backbone small.

    That they start a cluster where there is none is seen elsewhere (tests/test_profile.py).
    """
    text = (ROOT / "docs" / "tutorial.md").read_text()
    sections = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    blocks = {
        name: "\n".join(re.findall("^ {4}(.*)$", sections[name], re.M))
        for name in (*WALKED, SEVERAL)
    }
    alone, several = "\n".join(blocks[name] for name in WALKED), blocks[SEVERAL]
    assert alone.count("mlvicx ") > 6 and "laptop.sh down" in several
    for name in ("cluster", "configs", "sharding"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_phantoms(tmp_path / "drawn", 300, size_px=64)
    for number, path in enumerate(sorted((tmp_path / "drawn").rglob("*.[dp][cn][mg]"))):
        there = tmp_path / "images" / ("odd" if number % 2 else "even") / path.name
        there.parent.mkdir(parents=True, exist_ok=True)
        path.rename(there)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mlvicx").write_text(SHORT)
    (tmp_path / "bin" / "mlvicx").chmod(0o755)
    path = os.pathsep.join((str(tmp_path / "bin"), str(Path(sys.executable).parent)))
    with tempfile.TemporaryDirectory(prefix="walk") as short:
        # The path of a Unix socket is short.
        env = {**os.environ, "PATH": f"{path}{os.pathsep}{os.environ['PATH']}", "TMPDIR": short}
        # One cluster for what is typed on one machine: a private one each would take a minute more.
        laptop.up(1, cpus=2)
        try:
            done = run("bash", "-euxc", alone, cwd=tmp_path, env={**env, **laptop.env})
            assert done.returncode == 0, done.stderr[-3000:]
            laptop.down()
            done = run("bash", "-euxc", several, cwd=tmp_path, env=env)
            assert done.returncode == 0, done.stderr[-3000:]
        finally:
            run("cluster/laptop.sh", "down", cwd=tmp_path, env=env)
    report = (tmp_path / "runs" / "mine" / "report.html").read_text()
    assert "untrained" in report
    assert (tmp_path / "embeddings.parquet").stat().st_size > 1e5
    assert json.loads((tmp_path / "runs" / "three" / "metrics.jsonl").read_text().splitlines()[-1])
