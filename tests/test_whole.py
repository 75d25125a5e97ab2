"""The whole way, as a user walks it: the demo, the tutorial, and real radiographs by the README."""

import json
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest

from mlvicx_dist.ingest.sources.phantom import write_phantoms

ROOT = Path(__file__).parents[1]
MLVICX = [sys.executable, "-m", "mlvicx_dist"]


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_shows_that_pretraining_helps(tmp_path):
    done = run(*MLVICX, "demo", "--out", str(tmp_path / "demo"), "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["difference"]["value"] >= 0.03
    assert result["difference"]["low"] > 0
    assert Path(result["report"]).stat().st_size > 1e6
    again = run(*MLVICX, "demo", "--out", str(tmp_path / "demo"), "--json")
    assert again.returncode == 0
    # Nothing is trained again.
    assert json.loads(again.stdout)["seconds"] < result["seconds"] / 4


@pytest.mark.slow
@pytest.mark.shared_data
@pytest.mark.timeout(900)
def test_real_radiographs_by_the_commands_of_the_readme(shared_data, tmp_path, laptop):
    # One cluster for all of them: a private one each would take a minute more.
    laptop.up(1, cpus=2)
    there = partial(run, env={**os.environ, **laptop.env})
    cxr, salt = shared_data / "cxr", tmp_path / "salt"
    pack = [sys.executable, str(ROOT / "sharding" / "shard_folder.py"), "--salt-file", str(salt)]
    nih = there(
        *(*pack, "--source", str(cxr), "--csv", str(cxr / "labels.csv"), "--json"),
        *("--where", "file=images/nih_*", "--path-column", "file", "--labels-column", "label"),
        *("--patient-column", "patient_id", "--classes", "pneumonia", "--short-side-px", "128"),
        *("--fractions", "0.4,0.1,0.5", "--out", str(tmp_path / "nih")),
    )
    assert nih.returncode == 0, nih.stderr
    assert sum(json.loads(nih.stdout)["splits"].values()) == 652
    findings = there(
        *(*pack, "--source", str(cxr), "--csv", str(cxr / "labels.csv"), "--json"),
        *("--where", "file=images/nihml_*", "--path-column", "file"),
        *("--labels-column", "findings", "--patient-column", "patient_id"),
        *("--short-side-px", "128", "--fractions", "0.4,0.1,0.5"),
        *("--out", str(tmp_path / "nihml")),
    )
    assert findings.returncode == 0, findings.stderr
    assert sum(json.loads(findings.stdout)["splits"].values()) == 407
    kermany = there(
        *(
            *pack,
            "--source",
            str(shared_data / "kermany_train"),
            "--json",
            "--short-side-px",
            "128",
        ),
        *(
            "--patient-regex",
            "^(person[0-9]+|(?:NORMAL2-)?IM-[0-9]+)[_-]",
            "--out",
            str(tmp_path / "kermany"),
        ),
        *("--near-duplicates", "drop"),
    )
    assert kermany.returncode == 0, kermany.stderr
    # One radiograph is there twice; the salt decides whether its copies are in one split.
    assert sum(json.loads(kermany.stdout)["splits"].values()) in (5215, 5216)
    settings = ROOT / "configs" / "pretrain" / "cxr96.yaml"
    sets = [
        *("--set", f"data.shards.0.path={tmp_path / 'nih'}", "--set", "train.epochs=1"),
        *("--set", f"data.shards.1.path={tmp_path / 'kermany'}"),
        *("--set", f"data.shards.2.path={tmp_path / 'nihml'}"),
        *("--set", f"run.storage_path={tmp_path}", "--set", "views.image_size_px=48"),
        *("--set", "train.precision=float32"),
    ]
    trained = there(*MLVICX, "pretrain", str(settings), *sets)
    assert trained.returncode == 0, trained.stderr
    probed = there(
        *(*MLVICX, "evaluate", str(tmp_path / "cxr96"), "--json"),
        str(ROOT / "configs" / "evaluate" / "nih_pneumonia.yaml"),
        *("--set", f"data.shards.0={tmp_path / 'nih'}"),
    )
    assert probed.returncode == 0, probed.stderr
    assert 0.5 < json.loads(probed.stdout)["probe"]["pretrained"]["pneumonia"]["value"] < 1
    assert there(*MLVICX, "verify", str(tmp_path / "kermany")).returncode == 0


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
@pytest.mark.timeout(900)
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
