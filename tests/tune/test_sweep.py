"""Whole sweeps on Ray: their end, their resume, what diverges, dies or finds no room."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from small import small_tree

from mlvicx_dist.cli import main
from mlvicx_dist.config import PretrainConfig, SweepConfig, load_as, parse_config
from mlvicx_dist.session import ray_session
from mlvicx_dist.train.checkpoint import newest_checkpoint
from mlvicx_dist.tune import runner
from mlvicx_dist.tune.plan import make_plan
from mlvicx_dist.tune.records import Look, Record, Records

PER_LEVEL = {"model.local.fusion": {"choice": ["per_level"]}}
LOUD = 1e30
"""A learning rate that no weights survive."""


def tree(shards, folder, **changes):
    """A sweep of two small trials; `search__by="random"` changes a setting."""
    settings = {
        "kind": "sweep",
        "name": "small",
        "storage_path": str(folder),
        "pretrain": {
            "data": {"shards": [{"path": str(shards)}], "loader_workers": 0},
            **small_tree(),
            "train": {
                "batch_size": 6,
                "epochs": 4,
                "optimizer": "adamw",
                "warmup_epochs": 0.2,
                "learning_rate_per_256": 1e-3,
            },
            "checkpoint": {"every_steps": 4, "keep": 1},
        },
        "space": {"loss.lambda_local": {"choice": [0.5, 2.0]}},
        "search": {"by": "grid"},
        "asha": None,
        "target": {"every_steps": 4, "images": 16},
        "confirm": {"seeds": 0},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            settings[section] = {**(settings[section] or {}), name: value}
        else:
            settings[section] = value
    return settings


def written(folder, settings):
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def swept(capsys, path, *more):
    """What `mlvicx sweep` says of itself, and its exit code."""
    code = main(["sweep", str(path), "--json", *more])
    out, err = capsys.readouterr()
    return (json.loads(out) if out else None), code, err


@pytest.fixture(scope="module")
def ray():
    with ray_session({"CPU": 2}, asked="the test", remedy="take two cores", dashboard=True):
        yield


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.alone
def test_a_sweep_to_its_end_with_one_trial_that_diverges(ray, phantom_shards, tmp_path, capsys):
    settings = tree(phantom_shards, tmp_path / "sweeps", confirm__seeds=1)
    settings["space"]["train.learning_rate_per_256"] = {"choice": [1e-3, LOUD]}
    settings["search"] |= {"trials": 3}
    path = written(tmp_path, settings)
    document, code, _ = swept(capsys, path)
    assert code == 0
    assert (document["finished"], document["diverged"]) == (2, 1)
    folder = tmp_path / "sweeps" / "small"
    records = Records.read(folder / "trials").all()
    lost = [r for r in records if r.state == "diverged"]
    assert [r.point["train.learning_rate_per_256"] for r in lost] == [LOUD]
    assert "lower train.learning_rate_per_256" in lost[0].cause
    best = document["best"]
    assert best["looks"][-1]["target"] == max(r.target for r in records if r.state == "finished")
    assert [look["step"] for look in best["looks"]] == [4, 8, 12, 16]
    # What `pretrain` takes as it is: the best point, and the rest as it was.
    config = load_as(PretrainConfig, folder / "best.yaml")
    assert config.loss.lambda_local == best["point"]["loss.lambda_local"]
    assert (config.run.name, config.train.epochs) == ("small-best", 4)
    confirmed = json.loads((folder / "confirm.json").read_text())
    values = confirmed["values"]
    assert confirmed["low"] is None and len(values["best"]) == len(values["default"]) == 1
    assert confirmed["difference"] == pytest.approx(values["best"][0] - values["default"][0])
    # Its encoder stays, what only going on would need does not.
    trial = folder / "trials" / f"{best['number']:04d}"
    assert list((trial / "exports").glob("*/encoder.safetensors"))
    assert not (trial / "checkpoints").exists()
    # The same command again does nothing.
    began = time.monotonic()
    again, code, _ = swept(capsys, path)
    assert (again["best"], again["confirmed"], code) == (best, document["confirmed"], 0)
    assert Records.read(folder / "trials").all() == records
    assert time.monotonic() - began < 60
    # One more trial than before, and nothing else.
    longer, _, _ = swept(capsys, path, "--set", "search.trials=4")
    assert longer["trials"] == 4 and longer["diverged"] == 2
    # Another target is another sweep.
    _, code, err = swept(capsys, path, "--set", "target.images=20")
    assert code == 2 and "target.images was 16 and is 20" in err
    assert main(["report", str(folder), "--json"]) == 0
    page = Path(json.loads(capsys.readouterr().out)["report"]).read_text()
    assert "diverged" in page and "best.yaml" in page and "no interval" in page


@pytest.mark.slow
def test_trials_of_two_workers_never_wait_for_each_other(
    ray, phantom_shards, tmp_path, capsys, monkeypatch
):
    """Two cores hold one such trial; two that are at it all the same take turns and both end."""
    settings = tree(phantom_shards, tmp_path / "sweeps")
    settings["pretrain"]["workers"] = {"num": 2}
    path = written(tmp_path, settings)
    assert runner.concurrency(make_plan(load_as(SweepConfig, path))) == 1
    monkeypatch.setattr(runner, "slots", lambda needed: 4)
    document, code, _ = swept(capsys, path)
    assert code == 0 and document["finished"] == 2
    first, second = Records.read(tmp_path / "sweeps" / "small" / "trials").all()
    # Both were begun, and the one had its workers when the other was done.
    assert abs(second.began_s - first.began_s) < 5
    early, late = sorted([first, second], key=lambda record: record.ended_s)
    assert late.looks[0].at_s >= early.looks[-1].at_s


def test_more_workers_than_there_is_room_for(ray, phantom_shards, tmp_path, capsys):
    settings = tree(phantom_shards, tmp_path / "sweeps")
    settings["pretrain"]["workers"] = {"num": 3}
    _, code, err = swept(capsys, written(tmp_path, settings))
    assert code == 2 and "asks for 3 CPUs, but the cluster has 2" in err
    assert not (tmp_path / "sweeps" / "small" / "trials").exists()


@pytest.mark.slow
def test_all_failed(ray, phantom_shards, tmp_path, capsys):
    settings = tree(phantom_shards, tmp_path / "sweeps")
    settings["pretrain"]["train"]["learning_rate_per_256"] = LOUD
    _, code, err = swept(capsys, written(tmp_path, settings))
    assert code == 1
    last = err.strip().splitlines()[-1]
    assert "no trial of 2 came to its end; the first cause: trial 0000 diverged: step " in last


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"target__every_steps": 1000},
            "a trial has 16 steps; lower it, or raise pretrain.train.epochs.",
        ),
        (
            {"target__every_steps": 1000, "pretrain__train": {"batch_size": 6, "steps": 5}},
            "a trial has 5 steps; lower it, or raise pretrain.train.steps.",
        ),
        ({"target__val": "valid"}, "no images of the split valid"),
        ({"pretrain__workers": {"num": 7}}, "a batch of 6 images cannot be shared"),
        ({"space": {"model.levels": {"choice": [[9]]}}}, "level"),
        (
            {
                "space": {
                    "views.image_size_px": {"choice": [16, 32]},
                    "views.blur_kernel_px": {"choice": [5, 33]},
                }
            },
            "could not run, since",
        ),
        ({"space": PER_LEVEL | {"loss.level_weights.9": {"choice": [1, 2]}}}, "names level 9"),
        (
            {"space": PER_LEVEL | {"loss.level_weights.1": {"choice": [-1]}}},
            "greater than or equal",
        ),
        (
            {"target__held_back": 1e-9, "confirm__seeds": 1},
            "images of the split would be held back",
        ),
        ({"space": {"loss.lambda_local": {"log_uniform": [1, 2]}}}, "a grid needs a choice"),
        (
            {"search": {"by": "grid", "warm_start": {"sweep": "earlier"}}},
            "search.warm_start has no effect with search.by: grid",
        ),
        (
            {"target": {"kind": "effective_rank", "classes": ["a"]}},
            "target.classes has no effect with target.kind: effective_rank",
        ),
        ({"search": {"warm_start": {"sweep": "/nowhere/sweep"}}}, "none of its 0 finished trials"),
    ],
)
def test_what_is_refused_before_ray_starts(phantom_shards, tmp_path, capsys, change, words):
    path = written(tmp_path, tree(phantom_shards, tmp_path / "sweeps", **change))
    _, code, err = swept(capsys, path)
    assert code == 2 and words in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("sweep.yaml", b"\xff\xfe", "settings cannot be read"),
        ("sweep.yaml", b"kind: pretrain", "settings cannot be read"),
        ("confirm.json", b"{", "confirm.json: the file is damaged"),
        ("trials/0000/trial.json", b"[", "the record of a trial is damaged"),
    ],
)
def test_the_report_of_a_damaged_sweep_is_a_sentence(
    phantom_shards, tmp_path, capsys, name, content, words
):
    written(tmp_path, tree(phantom_shards, tmp_path))
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    assert main(["report", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("length", "words"), [({"epochs": 7}, "7 epochs"), ({"epochs": 7, "steps": 12}, "12 steps")]
)
def test_the_page_says_how_long_trials_are(phantom_shards, tmp_path, length, words):
    settings = tree(phantom_shards, tmp_path)
    settings["pretrain"]["train"] = {"batch_size": 6, **length}
    written(tmp_path, settings)
    assert main(["report", str(tmp_path)]) == 0
    assert f"Trials of\n{words}, test_resnet" in (tmp_path / "report.html").read_text()


def test_the_best_of_an_earlier_sweep_is_tried_first(phantom_shards, tmp_path):
    earlier = Records(tmp_path / "earlier" / "trials")
    for number, (value, target) in enumerate([(0.5, 0.6), (2.0, 0.9), (50.0, 0.95), (1.0, 0.7)]):
        point, look = {"loss.lambda_local": value}, Look(16, target, 1.0, 1.0, 0.1)
        earlier.write(Record(number, point, "finished", (look,)))
    settings = tree(phantom_shards, tmp_path / "sweeps")
    settings["space"] = {"loss.lambda_local": {"log_uniform": [0.1, 10]}}
    settings["search"] = {"warm_start": {"sweep": str(tmp_path / "earlier"), "trials": 2}}
    # 50 lies outside of this space.
    plan = make_plan(parse_config(settings, "sweep.yaml"))
    assert [point["loss.lambda_local"] for point in plan.first] == [2.0, 1.0]


@pytest.mark.chaos
def test_a_driver_that_is_killed_loses_no_finished_trial(phantom_shards, tmp_path):
    """Stopped by a signal, then killed, then left alone."""
    settings = tree(phantom_shards, tmp_path / "sweeps")
    settings["space"] = {"loss.lambda_local": {"choice": [0.5, 1.0, 2.0]}}
    settings["pretrain"]["train"]["epochs"] = 30
    path = written(tmp_path, settings)
    folder = tmp_path / "sweeps" / "small" / "trials"
    command = [sys.executable, "-m", "mlvicx_dist", "sweep", str(path), "--json"]

    def ended():
        return {r.number: r for r in Records.read(folder).all() if r.state == "finished"}

    def looks():
        return sum(len(record.looks) for record in Records.read(folder).all())

    def attack(number, reached):
        with (tmp_path / "log").open("w") as log:
            driver = subprocess.Popen(command, stderr=log, stdout=log)
            deadline = time.monotonic() + 180
            while not reached() and time.monotonic() < deadline:
                assert driver.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.2)
            driver.send_signal(number)
            return driver.wait(timeout=60)

    assert attack(signal.SIGTERM, lambda: looks() > 4) == 128 + signal.SIGTERM
    words = (tmp_path / "log").read_text()
    assert '"stopped": true' in words and "Traceback" not in words
    assert not (tmp_path / "sweeps" / "small" / "best.yaml").exists()
    assert attack(signal.SIGKILL, ended) == -signal.SIGKILL
    finished = ended()
    assert len(finished) < 3
    under_way = [r for r in Records.read(folder).all() if r.state == "running"]
    saved = {r.number: newest_checkpoint(folder / r.name) for r in under_way}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    after = {r.number: r for r in Records.read(folder).all()}
    assert [r.state for r in after.values()] == ["finished"] * 3
    assert all(after[number] == record for number, record in finished.items())
    # What was under way went on from its checkpoint: looks up to there are the old ones.
    for record in under_way:
        path = saved[record.number]
        step = int(path.stem.removeprefix("step-")) if path else 0
        kept = [look for look in record.looks if look.step <= step]
        assert list(after[record.number].looks[: len(kept)]) == kept


@pytest.mark.chaos
def test_a_trial_whose_process_dies_goes_on_from_its_checkpoint(ray, phantom_shards, tmp_path):
    import ray as core
    from ray.util.state import list_actors

    settings = tree(phantom_shards, tmp_path / "sweeps", search__trials=1)
    settings["pretrain"]["train"]["epochs"] = 80
    path = written(tmp_path, settings)
    address = core.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "mlvicx_dist", "sweep", str(path), "--json"]
    sweep = subprocess.Popen(
        command,
        env={**os.environ, "RAY_ADDRESS": address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    records, killed = tmp_path / "sweeps" / "small" / "trials", None
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and killed is None:
        known = Records.read(records).all()
        if known and known[0].reached >= 40:
            actors = list_actors(filters=[("state", "=", "ALIVE")])
            killed = next(a.pid for a in actors if "ImplicitFunc" in a.class_name)
            os.kill(killed, signal.SIGKILL)
        time.sleep(0.1)
    out, err = sweep.communicate(timeout=170)
    assert killed is not None and sweep.returncode == 0, err
    record = Records.read(records).all()[0]
    assert (record.state, record.deaths) == ("finished", 1)
    assert json.loads(out)["finished"] == 1
    # Steps that were done before were not done again, but for those since the last checkpoint.
    assert [look.step for look in record.looks] == list(range(4, 321, 4))


@pytest.mark.slow
def test_as_a_job_on_two_nodes(laptop, phantom_shards, tmp_path):
    """`ray job submit … -- python -m mlvicx_dist sweep configs/sweep/smoke.yaml`."""
    laptop.up(2, cpus=1)
    env = {**os.environ, **laptop.env}
    bin_folder = Path(sys.executable).parent
    sets = [f"pretrain.data.shards.0.path={phantom_shards}", f"storage_path={tmp_path}"]
    sets += ["pretrain.train.batch_size=4", "target.images=16", "target.every_steps=2"]
    sets += ["asha.grace_steps=2", "pretrain.train.epochs=2", "search.trials=2"]
    done = subprocess.run(
        [
            *(str(bin_folder / "ray"), "job", "submit", "--working-dir", "."),
            *("--", sys.executable, "-m", "mlvicx_dist", "sweep", "configs/sweep/smoke.yaml"),
            *(part for one in sets for part in ("--set", one)),
        ],
        cwd=Path(__file__).parents[2],
        env=env,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = Records.read(tmp_path / "smoke" / "trials").all()
    assert len(records) == 2 and {r.state for r in records} <= {"finished", "pruned"}
