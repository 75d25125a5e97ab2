"""What is said of what nodes tell."""

import pytest
from group import settings

from mlvicx_dist.config import parse_config
from mlvicx_dist.doctor import findings

NODE = {
    "versions": {"python": "3.12.3", "torch": "2.14.1", "ray": "2.60.0", "cuda": "13.0"},
    "gpus": [],
    "cpus": 8,
    "bf16": True,
    "open_files": 65536,
    "shm_bytes": 2**33,
    "cache_bytes": 10**11,
    "temp": {"total": 10**12, "used": 10**11, "free": 9 * 10**11},
}
GPU = {"name": "NVIDIA L4", "memory_bytes": 24 * 10**9}


def node(**changes):
    return {**NODE, **changes}


def states(found):
    return [finding.state for finding in found]


@pytest.fixture
def config(tmp_path):
    def made(**changes):
        return parse_config(settings("s3://bucket/shards", tmp_path, **changes), "test")

    return made


def test_versions_that_differ_are_named_with_their_nodes():
    other = node(versions={**NODE["versions"], "torch": "2.13.0"})
    found = list(findings.versions({"a": node(), "b": other, "c": node()}))
    assert states(found) == ["bad"]
    assert "torch is 2.14.1 on a, c, 2.13.0 on b" in found[0].words and found[0].remedy
    assert states(findings.versions({"a": node(), "b": node()})) == ["ok"]


def test_drivers_are_compared_where_there_are_gpus():
    first = node(gpus=[GPU], versions={**NODE["versions"], "driver": "570.1"})
    second = node(gpus=[GPU], versions={**NODE["versions"], "driver": "580.2"})
    assert states(findings.versions({"head": node(), "a": first})) == ["ok"]
    found = list(findings.versions({"head": node(), "a": first, "b": second}))
    assert states(found) == ["warn"] and "driver is 570.1 on a, 580.2 on b" in found[0].words


@pytest.mark.parametrize(
    ("gpus", "wanted", "state", "words"),
    [
        ([GPU, GPU], True, "ok", "2 x NVIDIA L4 of 24 GB"),
        ([GPU], False, "warn", "workers.use_gpu is false"),
        ([], True, "warn", "no node that is up has a GPU"),
        ([], False, "ok", "none"),
    ],
)
def test_gpus(config, gpus, wanted, state, words):
    found = list(findings.devices({"a": node(gpus=gpus)}, config(workers__use_gpu=wanted)))
    assert states(found) == [state] and words in found[0].words


def test_bf16_in_software(config):
    nodes = {"a": node(), "b": node(bf16=False)}
    assert states(findings.devices(nodes, config())) == ["ok"]
    found = list(findings.devices(nodes, config(train__precision="bf16")))
    assert states(found) == ["ok", "warn"] and "the CPU of b" in found[1].words


def test_limits_of_a_node(config):
    assert states(findings.limits({"a": node()}, config())) == ["ok", "ok", "ok"]
    poor = node(
        open_files=1024,
        shm_bytes=2**10,
        temp={"total": 100, "used": 96, "free": 4},
    )
    found = list(findings.limits({"a": node(), "b": poor}, config()))
    assert states(found) == ["warn", "bad", "bad"]
    assert all("b" in finding.words and finding.remedy for finding in found)
    # Two views of a worker's share, for each loader process and what waits in its queue.
    needed = findings._shm_bytes(config(train__batch_size=512, data__loader_workers=4))
    assert needed == 3 * 4 * 2 * 512 * 32**2


@pytest.mark.parametrize(
    ("free", "wanted", "limit_gb", "state"),
    [
        (10**11, 0, 50, "ok"),
        (10**11, 4 * 10**10, 50, "ok"),
        (10**11, 6 * 10**10, 50, "warn"),
        (10**9, 4 * 10**10, 50, "bad"),
        (10**9, 5 * 10**8, 50, "ok"),
    ],
)
def test_cache(config, free, wanted, limit_gb, state):
    nodes = {"a": node(cache_bytes=free)}
    assert findings.cache(nodes, config(data__cache_gb=limit_gb), wanted).state == state


def test_clocks_apart_by_more_than_can_be_measured():
    assert findings.clocks({"a": (0.0, 0.001), "b": (-0.5, 0.01)}).state == "ok"
    assert findings.clocks({"a": (0.0, 0.001), "b": (1.5, 1.0)}).state == "ok"
    found = findings.clocks({"a": (0.0, 0.001), "b": (-30.0, 0.01)})
    assert found.state == "warn" and found.words.startswith("b: 30 s apart")


def test_storage_that_one_node_cannot_write_or_see():
    fast = {"name": "x", "write_s": 0.01, "read_s": 0.002}
    key = "run.storage_path"
    assert states(findings.storage("/runs", key, {"a": fast, "b": fast}, [])) == ["ok"]
    found = list(findings.storage("/runs", key, {"a": fast, "b": {"error": "Access denied"}}, []))
    assert states(found) == ["bad"] and "on b (Access denied)" in found[0].words
    found = list(findings.storage("/runs", key, {"a": fast, "b": fast}, [("b", "a")]))
    assert states(found) == ["bad"] and "b does not see what a wrote" in found[0].words
    slow = {**fast, "read_s": 9.0}
    assert states(findings.storage("s3://b/runs", key, {"a": slow}, [])) == ["warn"]


def test_gradients_and_loader_are_beside_a_step():
    assert findings.gradients(1e9, 10**8, 2.0, 4e8).state == "ok"
    slow = findings.gradients(1e8, 10**8, 2.0, 4e8)
    assert slow.state == "warn" and slow.words.startswith("4 s for those of 100 million")
    assert findings.loading(300.0, 40.0, 1).state == "ok"
    assert findings.loading(30.0, 40.0, 1).state == "warn"
    assert "between steps" in findings.loading(300.0, 40.0, 0).words


def test_a_line_has_state_name_words_and_remedy():
    line = findings.Finding("disk", "bad", "a: full", "make room").line()
    assert line == "bad   disk        a: full; make room"
