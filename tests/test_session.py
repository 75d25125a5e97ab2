"""What a cluster can hold: its nodes, and those that its autoscaler may add."""

import pytest
import ray

from mlvicx_dist import session


@pytest.fixture
def nodes(monkeypatch):
    """A cluster of a head without cores and one node of eight."""
    alive = [{"CPU": 0.0, "memory": 4e9}, {"CPU": 8.0, "GPU": 1.0, "memory": 16e9}]
    found = [{"Alive": True, "Resources": one} for one in alive]
    found.append({"Alive": False, "Resources": {"CPU": 64.0}})
    monkeypatch.setattr(ray, "nodes", lambda: found)
    monkeypatch.setattr("ray._private.state.state.get_cluster_config", lambda: None)


def test_workers_fit_node_by_node(nodes, monkeypatch, tmp_path):
    monkeypatch.setattr(session, "BOOTSTRAP", tmp_path / "none.yaml")
    assert session.slots({"CPU": 3}) == 2
    assert session.slots({"CPU": 9}) == 0
    assert session.slots({"CPU": 1, "GPU": 1}) == 1
    assert session.slots({"CPU": 1, "memory": 5e9}) == 3
    assert session._whole_cluster()["CPU"] == 8


def test_what_ray_up_may_add_counts(nodes, monkeypatch, tmp_path):
    path = tmp_path / "ray_bootstrap_config.yaml"
    path.write_text(
        """
max_workers: 3
head_node_type: head
available_node_types:
  head: {resources: {CPU: 0}, max_workers: 0}
  gpu: {resources: {CPU: 8, GPU: 2}, min_workers: 0, max_workers: 10}
"""
    )
    monkeypatch.setattr(session, "BOOTSTRAP", path)
    assert session.slots({"CPU": 4, "GPU": 1}) == 6
    # The memory of a node that is not there yet is not known.
    assert session.slots({"CPU": 8, "memory": 1e12}) == 3
    assert session._whole_cluster() == {"CPU": 24, "GPU": 6}
    # On machines of one's own Ray writes no resources: those of the nodes that are there count.
    path.write_text(path.read_text().replace("{CPU: 0}", "{}").replace("{CPU: 8, GPU: 2}", "{}"))
    assert session.slots({"CPU": 4}) == 2
