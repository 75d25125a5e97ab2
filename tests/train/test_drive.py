"""What the driver says of a group."""

from types import SimpleNamespace

import pytest
import ray
from ray.autoscaler.v2 import sdk

from mlvicx_dist.doctor.findings import launches
from mlvicx_dist.session import refused_launches
from mlvicx_dist.train import drive
from mlvicx_dist.train.drive import placed


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
    monkeypatch.setattr(drive, "REFUSALS_S", 0.0)
    refusals = drive._Refusals(SimpleNamespace(say=said.append))
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
    drive._Shown(bar, lambda row: None)(row)
    assert told == [(2, f"100 images/s, data wait 2%, {words}")]
