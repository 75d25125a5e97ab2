"""A release: what is in the wheel, and that no pin goes out unasked."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True
    )
    ours = [name for name in listed.stdout.split("\0") if (ROOT / name).is_file()]
    for name in ours:
        there = tmp_path / "checkout" / name
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_bytes((ROOT / name).read_bytes())
    # What lies about, in the package too, stays where it is.
    for name in ("mlvicx_dist/patient.dcm", "mlvicx_dist/report/a.png", "shards/a.tar"):
        (tmp_path / "checkout" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "checkout" / name).write_bytes(b"x")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    made = [*pip, "--wheel-dir", tmp_path, tmp_path / "checkout"]
    subprocess.run(made, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    about = {name.partition("/")[2] for name in names if ".dist-info/" in name}
    assert {name for name in names if ".dist-info/" not in name} == {
        name for name in ours if name.startswith("mlvicx_dist/")
    }
    assert about == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "licenses/LICENSE",
        "top_level.txt",
    }


@pytest.mark.parametrize(
    ("answer", "given", "code", "words"),
    [
        ("exit 0", (), 0, "no pin has a known vulnerability"),
        ("echo 'torch 2.0 PYSEC-1'; exit 1", (), 2, "have known vulnerabilities; raise them"),
        ("exit 1", (), 2, "the pins were not audited, since the service did not answer"),
        ("exit 1", ("AUDIT=skip",), 0, "AUDIT=skip: the pins of constraints.txt were not audited"),
    ],
)
def test_pins_that_were_not_audited_are_no_audited_pins(tmp_path, answer, given, code, words):
    """By a stand-in for pip-audit."""
    tool = tmp_path / "pip-audit"
    tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n{answer}\n')
    tool.chmod(0o755)
    make = ["make", "-C", ROOT, "-o", ".venv/.release", f"BIN={tmp_path}", *given, "audit"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(make, capture_output=True, text=True, env=env)
    assert done.returncode == code
    assert words in done.stderr
    if not given:
        # Without it pip-audit is content with pins that the service does not know.
        asked = (tmp_path / "asked").read_text().split()
        assert {"--strict", str(ROOT / "constraints.txt")} <= set(asked)


def test_what_is_asked_for_is_pinned():
    """All but `gs` and `wandb`, whose libraries no test here needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for name in ("gs", "wandb"):
        del extras[name]
    asked = [*project["dependencies"], *(one for extra in extras.values() for one in extra)]
    pins = {plain(line.partition("==")[0]) for line in (ROOT / "constraints.txt").open()}
    assert [one for one in asked if plain(re.match(r"[\w.-]+", one)[0]) not in pins] == []


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()
