"""The command line: quick help, one way in, exit codes, JSON alone on stdout."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlvicx_dist import cli
from mlvicx_dist.cli import main

ROOT = Path(__file__).parents[1]
COMMANDS = [
    "demo",
    "pretrain",
    "sweep",
    "doctor",
    "plan",
    "profile",
    "evaluate",
    "compare",
    "embed",
    "report",
    "export",
    "verify",
    "inspect",
]
HELPS = [
    *([sys.executable, "-m", "mlvicx_dist", name, "--help"] for name in ("", *COMMANDS)),
    *([sys.executable, str(path), "--help"] for path in sorted(ROOT.glob("sharding/*.py"))),
]


@pytest.mark.parametrize("command", HELPS, ids=lambda c: " ".join(Path(p).name for p in c[-2:]))
def test_every_help_answers_within_three_tenths_of_a_second(command):
    times = []
    for _ in range(5):
        start = time.perf_counter()
        done = subprocess.run([p for p in command if p], capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - start)
        if times[-1] < 0.3:
            break
    assert "usage" in done.stdout
    assert min(times) < 0.3


def test_an_unknown_command_is_the_users_error():
    with pytest.raises(SystemExit) as caught:
        main(["pretrian"])
    assert caught.value.code == 2


@pytest.mark.parametrize("given", ["-1", "x", "1.5"])
def test_what_is_no_number_of_loader_processes_is_the_users_error(given, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["embed", "run", "shards", "--out", "x", "--loader-workers", given])
    assert caught.value.code == 2
    assert f"'{given}' is no whole number from 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pretrain", "/nowhere.yaml"], "/nowhere.yaml: the settings file cannot be read"),
        (["verify", "/nowhere"], "/nowhere: there is no such folder of shards"),
        (["inspect", "/nowhere"], "/nowhere: there is no such folder of shards"),
        (["report", "/nowhere"], "/nowhere: it is no folder of a run, a sweep or a comp"),
        (["export", "/nowhere", "--out", "/tmp/never"], "/nowhere: there is no such file"),
        (["embed", "/nowhere", "x", "--out", "y"], "/nowhere: there is no such file or folder"),
        (["evaluate", "/nowhere", str(ROOT / "configs/evaluate/cpu.yaml")], "/nowhere: there is"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_two(arguments, words, capsys):
    assert main(arguments) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert words in streams.err
    assert len(streams.err.strip().splitlines()) == 1


@pytest.mark.parametrize("out", ["/nowhere/sheet.png", "sheet.xyz"])
def test_a_sheet_that_cannot_be_written_is_one_sentence(phantom_shards, out, capsys):
    assert main(["inspect", str(phantom_shards), "--out", out]) == 2
    error = capsys.readouterr().err
    assert f"{out}: the picture cannot be written" in error
    assert len(error.strip().splitlines()) == 1


def test_inspect_draws_a_sheet(phantom_shards, tmp_path, capsys):
    from PIL import Image

    out = tmp_path / "sheet.png"
    assert main(["inspect", str(phantom_shards), "--out", str(out), "--count", "4"]) == 0
    sheet = Image.open(out)
    assert sheet.width > 900
    assert sheet.height > 300
    assert "4 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    "environment",
    [
        {"RAY_ADDRESS": "nonsense"},
        {
            "RAY_ADDRESS": "127.0.0.1:1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": "/dev/null/token",
        },
    ],
    ids=["no address", "no token"],
)
def test_an_address_where_no_cluster_can_be_used_gets_one_sentence(environment):
    code = "from mlvicx_dist.session import ray_session\n" + (
        "with ray_session({'CPU': 1}, asked='a', remedy='b'): pass"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "RAY_AUTH_TOKEN"}
        | environment,
        check=False,
    )
    address = environment["RAY_ADDRESS"]
    assert f"ResourceError: RAY_ADDRESS={address}: no Ray cluster can be used there" in done.stderr


def test_stdout_is_for_the_answer_alone(monkeypatch, capsys):
    def handler(options):
        print("a library that prints")  # noqa: T201
        return cli.Answer({"answer": 1}, [])

    monkeypatch.setattr(cli, "_report", handler)
    assert cli.main(["report", "anything", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"answer": 1}
    assert "a library that prints" in err


PRINT = (
    "from mlvicx_dist.answer import Answer, answered; "
    "answered(lambda: Answer({{}}, {}), name='x', as_json=False)"
)


def test_an_answer_that_is_not_read_to_its_end_is_no_error():
    script = PRINT.format("['line'] * 100000")
    command = f'{sys.executable} -c "{script}" | head -1'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("line\n", "")


def test_an_answer_in_letters_that_a_terminal_lacks_is_given_all_the_same():
    script = PRINT.format("['Pleural_Thick…']")
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "Pleural_Thick?\n", "")


def test_overrides_without_settings_are_refused(capsys):
    assert main(["doctor", "--set", "workers.num=4"]) == 2
    assert "it changes settings; give a CONFIG too" in capsys.readouterr().err


def test_an_answer_that_cannot_be_written_is_one_sentence(phantom_shards):
    command = [sys.executable, "-m", "mlvicx_dist", "verify", str(phantom_shards), "--workers", "1"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "the answer cannot be written (No space left on device)" in done.stderr
    assert "Traceback" not in done.stderr and "ignored" not in done.stderr
