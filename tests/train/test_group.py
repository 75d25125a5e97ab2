"""What is told of a group of workers, and how its end is."""

import asyncio
import json
import sys
import threading
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
import ray
from ray.autoscaler.v2 import sdk

from mlvicx_dist.capacity import refused_launches
from mlvicx_dist.config import Workers
from mlvicx_dist.doctor.findings import launches
from mlvicx_dist.errors import DataError, ResourceError, TrainingError
from mlvicx_dist.progress import say
from mlvicx_dist.train import shown
from mlvicx_dist.train.failures import Failures
from mlvicx_dist.train.group import Fit, cluster, fitted, trainer
from mlvicx_dist.train.guard import _Guard
from mlvicx_dist.train.rows import POLL_S, append, telling, watching
from mlvicx_dist.train.shown import Refusals, Shown, placed


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([], ""),
        (["a"], ""),
        (["a", "a"], ""),
        (["a", "b"], " (rank 0 on a, 1 on b)"),
        (["a", "a", "b", "b", "c"], " (rank 0 to 1 on a, 2 to 3 on b, 4 on c)"),
    ],
)
def test_ranks_are_placed_on_nodes(nodes, words):
    assert placed(nodes) == words


def test_machines_that_a_quota_refuses_are_told_once(monkeypatch):
    refused = SimpleNamespace(
        count=2,
        ray_node_type_name="gpu",
        instance_type_name="g6.12xlarge",
        details="VcpuLimitExceeded",
    )
    context = SimpleNamespace(gcs_address="127.0.0.1:1")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(
        sdk, "get_cluster_status", lambda address: SimpleNamespace(failed_launches=[refused])
    )
    words = "2 x gpu (g6.12xlarge): VcpuLimitExceeded"
    assert refused_launches() == [words]
    assert [finding.state for finding in launches([words])] == ["bad"]
    said = []
    monkeypatch.setattr(shown, "REFUSALS_S", 0.0)
    refusals = Refusals(SimpleNamespace(say=said.append))
    refusals.tell()
    refusals.tell()
    assert said == [f"the autoscaler was refused {words}"]
    monkeypatch.setattr(sdk, "get_cluster_status", lambda address: 1 / 0)
    assert refused_launches() == []


@pytest.mark.parametrize(
    ("terms", "words"),
    [({"global/variance_weighted": 3.0}, "loss 4 (global/variance 3)"), ({}, "loss 4")],
)
def test_a_row_is_shown_with_the_terms_that_it_has(terms, words):
    told = []
    bar = SimpleNamespace(advance=lambda count, note: told.append((count, note)))
    row = {"step": 2, "loss": 4.0, "images_per_s": 100.0, "data_wait": 0.02, **terms}
    Shown(bar, lambda row: None)(row)
    assert told == [(2, f"100 images/s, data wait 2%, {words}")]


def test_a_group_that_says_something_is_at_work_still():
    said = []
    shown = Shown(SimpleNamespace(say=said.append, skip=lambda count: None), lambda row: None)
    shown({"step": 0, "world_size": 2})
    shown({"said": ["the disk is full"], "world_size": 2})
    assert shown.world_size == 2
    shown({"said": ["worker 0 died; beginning anew"]})
    assert (shown.world_size, len(said)) == (0, 3)


@pytest.mark.parametrize("row", [None, {"said": ["worker 0 died; beginning anew"]}])
def test_a_group_of_which_nothing_is_heard_is_not_waited_for(tmp_path, row):
    """Nor is one that dies again and again before its first word."""
    ended, channel = threading.Event(), tmp_path / "rows.jsonl"

    class Waiting:
        """Ray where it finds no place for the group."""

        def fit(self):
            while not ended.wait(0.1):
                if row:
                    with channel.open("a") as file:
                        file.write(json.dumps(row) + "\n")

    try:
        with pytest.raises(ResourceError, match=r"It failed: nothing was heard .* for 1 s"):
            fitted(Waiting(), "It failed", channel=channel, show=print, wait_s=1)
    finally:
        ended.set()


def test_a_group_that_is_heard_of_may_take_its_time(tmp_path):
    channel, rows = tmp_path / "rows.jsonl", []

    class Slow:
        """Rows every 0.4 s."""

        def fit(self):
            for step in range(5):
                threading.Event().wait(0.4)
                with channel.open("a") as file:
                    file.write(json.dumps({"step": step}) + "\n")
            return SimpleNamespace(return_value={"a": 1})

    found = fitted(Slow(), "It failed", channel=channel, show=rows.append, wait_s=1.2)
    assert found == {"a": 1}
    assert [row["step"] for row in rows] == list(range(5))


def test_what_ends_a_group_is_one_sentence(tmp_path):
    from ray.train import WorkerGroupError

    def ended(error):
        def fit():
            raise error

        return fitted(
            SimpleNamespace(fit=fit),
            "It failed",
            channel=tmp_path / "rows.jsonl",
            show=print,
            wait_s=9,
        )

    with pytest.raises(TrainingError, match=r"^It failed \(.*\)\.$"):
        ended(WorkerGroupError("no place", {}))
    with pytest.raises(DataError, match=r"^mine$"):
        ended(WorkerGroupError("a worker failed", {0: DataError("mine")}))


def test_what_goes_wrong_where_rows_are_shown_is_not_lost(tmp_path):
    def show(row):
        raise OSError(row["step"])

    with pytest.raises(OSError, match="1"), watching(tmp_path / "rows", show):
        with (tmp_path / "rows").open("a") as file:
            file.write('{"step": 1}\n{"step": 2}\n')


def test_rows_are_shown_after_one_that_could_not_be(tmp_path):
    shown = []

    def show(row):
        if row["step"] == 1:
            raise OSError("a store was away")
        shown.append(row["step"])

    with pytest.raises(OSError, match="away"), watching(tmp_path / "rows", show):
        append(tmp_path / "rows", '{"step": 1}\n{"step": 2}\n')
        time.sleep(2 * POLL_S)
        append(tmp_path / "rows", '{"step": 3}\n')
    assert shown == [2, 3]


@pytest.mark.parametrize("stderr", ["full", "closed"])
def test_a_stderr_that_nobody_reads_ends_nothing(monkeypatch, stderr):
    with open("/dev/full", "w") as full:
        if stderr == "closed":
            full.close()
        monkeypatch.setattr(sys, "stderr", full)
        say("a line")
        with suppress(OSError):
            full.close()
    monkeypatch.undo()


def test_failures_are_counted_from_the_furthest_step_that_was_told(tmp_path):
    channel = tmp_path / "rows.jsonl"
    callback = Failures(channel, 2)

    def die(*rows):
        with channel.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        callback.after_exception(None, {1: RuntimeError("a\nkilled")})
        return json.loads(channel.read_text().splitlines()[-1])["said"]

    begin = {"step": 0, "nodes": ["one", "two"]}
    said = ["worker 1 on two died (killed); going on from the newest checkpoint"]
    assert die(begin, {"step": 3, "loss": 1.0}) == said
    assert die({**begin, "nodes": ["one", "three"]})[0].startswith("worker 1 on three died")
    assert die({"step": 4, "loss": 1.0})
    assert die(begin)
    with pytest.raises(TrainingError, match=r"^step 4: the workers failed 3 times without"):
        die(begin)


def test_rows_that_a_full_disk_refused_come_with_the_next_ones(tmp_path):
    channel = tmp_path / "there" / "rows.jsonl"
    guard, rows = _Guard(channel), []
    asyncio.run(guard.write('{"step": 1}\n'))
    channel.parent.mkdir()
    with watching(channel, rows.append):
        channel.write_text('{"st')
        asyncio.run(guard.write('{"step": 2}\n'))
    assert rows == [{"step": 1}, {"step": 2}]


@pytest.mark.slow
@pytest.mark.alone
def test_a_worker_waits_for_nobody_that_takes_its_rows(tmp_path):
    """Ray Train's own `report` takes one row a look at the workers, which is a second."""

    def work(plan):
        rank = ray.train.get_context().get_world_rank()
        begin = time.monotonic()
        with telling(plan["guard"], rank) as tell:
            for step in range(100):
                tell({"step": step, "rank": rank})
            return time.monotonic() - begin

    workers, rows, channel = Workers(num=2), [], tmp_path / "rows.jsonl"
    with cluster(workers):
        group = trainer(work, {}, workers, channel, str(tmp_path))
        found = Fit(group)
        with watching(channel, rows.append):
            found.start()
            found.join()
    assert found.result(str) < 1
    assert rows == [{"step": step, "rank": 0} for step in range(100)]
