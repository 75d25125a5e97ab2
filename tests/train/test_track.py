"""Rows in MLflow and W&B: one run over all starts, no path, no wait for a server that is gone."""

import json
import threading
import time

import pytest
import torch
from group import At, settings

from mlvicx_dist.config import parse_config
from mlvicx_dist.errors import ConfigError
from mlvicx_dist.storage import place
from mlvicx_dist.train import track
from mlvicx_dist.train.loop import train
from mlvicx_dist.train.notices import NoNotices, Notice
from mlvicx_dist.train.runlog import read_rows
from mlvicx_dist.train.step import Member
from mlvicx_dist.train.track import check_trackers, tracking


def config(folder, **where):
    return parse_config(settings("shards", folder, run__track=where), "t")


def test_a_library_that_is_missing_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(track, "find_spec", lambda name: None)
    check_trackers(config(tmp_path))
    with pytest.raises(ConfigError, match=r"run.track.wandb: .*pip install 'mlvicx_dist\[wandb\]'"):
        check_trackers(config(tmp_path, wandb="chest"))


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("mlruns", "must be the URI of a tracking server or database"),
        ("sqlite:///mlflow.db", "must be the URI of a tracking server or database"),
        ("https://me:secret@mlflow.example.org", "MLFLOW_TRACKING_PASSWORD"),
    ],
)
def test_addresses_that_cannot_be_are_refused(tmp_path, address, words):
    with pytest.raises(ConfigError, match=words) as error:
        config(tmp_path, mlflow=address)
    assert "secret" not in str(error.value)


class Gone:
    """A service that is not there for the first rows."""

    def __init__(self, config, run_dir):
        self.rows, self.tries = [], 0

    def begin(self):
        self.tries += 1
        if self.tries < 3:
            raise OSError("no route to host")

    def write(self, row):
        self.rows.append(row)

    def end(self, finished):
        self.rows.append(finished)


def test_rows_wait_for_a_service_that_is_gone(tmp_path, monkeypatch):
    gone = Gone(None, None)
    monkeypatch.setitem(track.SERVICES, "mlflow", lambda config, run_dir: gone)
    monkeypatch.setattr(track, "find_spec", lambda name: True)
    said = []
    with tracking(
        config(tmp_path, mlflow="https://nowhere"), tmp_path, start=0, total=3, say=said.append
    ) as write:
        for step in (1, 2, 3):
            write({"step": step, "loss": 0.5, "words": "none"})
    assert gone.rows == [*({"step": step, "loss": 0.5} for step in (1, 2, 3)), True]
    (words,) = said
    assert words.startswith("run.track.mlflow: rows cannot be sent (no route to host); training")


def test_a_start_with_nothing_left_to_do_leaves_a_finished_run_finished(tmp_path, monkeypatch):
    gone = Gone(None, None)
    gone.tries = 3
    monkeypatch.setitem(track.SERVICES, "mlflow", lambda config, run_dir: gone)
    monkeypatch.setattr(track, "find_spec", lambda name: True)
    where = config(tmp_path, mlflow="https://nowhere")
    with tracking(where, tmp_path, start=3, total=3, say=print):
        pass
    assert gone.rows == [True]


def test_both_services_find_their_run_again(tmp_path, monkeypatch):
    both = threading.Barrier(2)

    class Begun(Gone):
        def begin(self):
            both.wait(10)
            track._remember(self.run_dir, self.name, "id")

    for name in ("mlflow", "wandb"):
        kind = type(name, (Begun,), {"name": name, "run_dir": tmp_path})
        monkeypatch.setitem(track.SERVICES, name, kind)
    monkeypatch.setattr(track, "find_spec", lambda name: True)
    where = config(tmp_path, mlflow="https://nowhere", wandb="chest")
    with tracking(where, tmp_path, start=0, total=1, say=print) as write:
        write({"step": 1, "loss": 1.0})
    assert json.loads((tmp_path / "track.json").read_text()) == {"mlflow": "id", "wandb": "id"}


@pytest.mark.slow
def test_a_run_whose_settings_cannot_be_sent_at_first_is_one_run(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install mlflow-skinny")
    from mlflow import MlflowClient

    address = f"sqlite:///{tmp_path}/mlflow.db"
    sent, left = MlflowClient.log_batch, [2]

    def log_batch(self, run_id, metrics=(), params=(), tags=()):
        if params and left[0]:
            left[0] -= 1
            raise OSError("no room")
        return sent(self, run_id, metrics=metrics, params=params)

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    said = []
    where = config(tmp_path, mlflow=address)
    with tracking(where, tmp_path, start=0, total=3, say=said.append) as write:
        for step in (1, 2, 3):
            write({"step": step, "loss": 1.0})
    client = MlflowClient(tracking_uri=address)
    (experiment,) = [e for e in client.search_experiments() if e.name == "mlvicx_dist"]
    (there,) = client.search_runs([experiment.experiment_id])
    assert there.info.status == "FINISHED"
    assert there.data.params["train.batch_size"] == "7"
    assert len(client.get_metric_history(there.info.run_id, "loss")) == 3
    assert len(said) == 1


@pytest.mark.slow
def test_mlflow_has_the_rows_of_a_run_that_went_on(phantom_shards, tmp_path):
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install mlflow-skinny")
    from mlflow import MlflowClient

    address = f"sqlite:///{tmp_path}/mlflow.db"
    wanted = parse_config(settings(phantom_shards, tmp_path, run__track={"mlflow": address}), "t")
    folder = tmp_path / "small"
    folder.mkdir()
    member = Member(0, 1, torch.device("cpu"))

    stop = At(Notice.STOP, 4)
    stopped = train(wanted, place(folder), member, report=lambda row: None, notices=stop)
    client = MlflowClient(tracking_uri=address)
    (experiment,) = [e for e in client.search_experiments() if e.name == "mlvicx_dist"]
    (first,) = client.search_runs([experiment.experiment_id])
    assert first.info.status == "KILLED"
    total = train(wanted, place(folder), member, report=lambda row: None, notices=NoNotices())
    assert stopped < total
    (there,) = client.search_runs([experiment.experiment_id])
    assert (there.info.run_id, there.info.status) == (first.info.run_id, "FINISHED")
    rows = read_rows(folder / "metrics.jsonl")
    for name in ("loss", "global/variance_weighted", "images_per_s"):
        found = client.get_metric_history(there.info.run_id, name)
        assert [(m.step, m.value) for m in found] == [(row["step"], row[name]) for row in rows]
    assert there.data.params["train.batch_size"] == "7"
    assert str(tmp_path) not in json.dumps(there.data.params)


@pytest.mark.slow
@pytest.mark.alone
def test_a_server_that_is_gone_does_not_hold_training_up(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install mlflow-skinny")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    said = []
    with tracking(
        config(tmp_path, mlflow="http://127.0.0.1:9"), tmp_path, start=0, total=2, say=said.append
    ) as write:
        began = time.monotonic()
        write({"step": 1, "loss": 1.0})
        assert time.monotonic() - began < 0.5
    assert [words.partition(" (")[0] for words in said] == ["run.track.mlflow: rows cannot be sent"]


@pytest.mark.slow
def test_wandb_goes_on_with_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    said = []
    for steps in ((1, 2), (2, 3)):
        with tracking(
            config(tmp_path, wandb="chest"), tmp_path, start=0, total=3, say=said.append
        ) as write:
            for step in steps:
                write({"step": step, "loss": 1.0 / step})
    assert said == []
    (known,) = json.loads((tmp_path / "track.json").read_text()).values()
    starts = list((tmp_path / "wandb").glob("offline-run-*"))
    assert starts and all(start.name.endswith(f"-{known}") for start in starts)
    kept = b"".join(path.read_bytes() for start in starts for path in start.rglob("*.wandb"))
    assert b"train.batch_size" in kept and str(tmp_path / "samples").encode() not in kept


@pytest.mark.parametrize("where", ["__init__", "begin"])
def test_whatever_a_library_raises_is_told(tmp_path, monkeypatch, where):
    class Broken(Gone):
        pass

    def fail(self, *given):
        raise ModuleNotFoundError("No module named 'psycopg2'")

    setattr(Broken, where, fail)
    monkeypatch.setitem(track.SERVICES, "mlflow", Broken)
    monkeypatch.setattr(track, "find_spec", lambda name: True)
    said = []
    with tracking(
        config(tmp_path, mlflow="postgresql://nowhere"), tmp_path, start=0, total=3, say=said.append
    ) as write:
        write({"step": 3, "loss": 1.0})
    (words,) = said
    assert "run.track.mlflow: rows cannot be sent (No module named 'psycopg2')" in words
