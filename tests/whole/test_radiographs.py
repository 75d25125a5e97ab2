"""Real radiographs, by the commands of the README."""

import json
import os
import sys
from functools import partial

import pytest
from typed import MLVICX, ROOT, run


@pytest.mark.slow
@pytest.mark.shared_data
@pytest.mark.timeout(1800)
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
