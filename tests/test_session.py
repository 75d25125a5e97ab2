"""What a cluster can hold, who gets into it, and that it knows itself beside another."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import ray

from mlvicx_dist import capacity, session
from mlvicx_dist.errors import ResourceError


@pytest.fixture
def nodes(monkeypatch):
    """A cluster of a head without cores and one node of eight."""
    alive = [{"CPU": 0.0, "memory": 4e9}, {"CPU": 8.0, "GPU": 1.0, "memory": 16e9}]
    found = [{"Alive": True, "Resources": one} for one in alive]
    found.append({"Alive": False, "Resources": {"CPU": 64.0}})
    monkeypatch.setattr(ray, "nodes", lambda: found)
    monkeypatch.setattr("ray._private.state.state.get_cluster_config", lambda: None)


def test_workers_fit_node_by_node(nodes, monkeypatch, tmp_path):
    monkeypatch.setattr(capacity, "BOOTSTRAP", tmp_path / "none.yaml")
    assert capacity.slots({"CPU": 3}) == 2
    assert capacity.slots({"CPU": 9}) == 0
    assert capacity.slots({"CPU": 1, "GPU": 1}) == 1
    assert capacity.slots({"CPU": 1, "memory": 5e9}) == 3
    assert capacity.whole_cluster()["CPU"] == 8


def test_what_ray_up_may_add_counts(nodes, monkeypatch, tmp_path):
    path = tmp_path / "ray_bootstrap_config.yaml"
    path.write_text(
        """
max_workers: 3
head_node_type: head
available_node_types:
  head: {resources: {CPU: 0}}
  gpu: {resources: {CPU: 8, GPU: 2}, min_workers: 0, max_workers: 10}
"""
    )
    monkeypatch.setattr(capacity, "BOOTSTRAP", path)
    assert capacity.slots({"CPU": 4, "GPU": 1}) == 6
    # The memory of a node that is not there yet is not known.
    assert capacity.slots({"CPU": 8, "memory": 1e12}) == 3
    assert capacity.whole_cluster() == {"CPU": 24, "GPU": 6}
    # All kinds together are no more than three.
    path.write_text(path.read_text() + "  big: {resources: {CPU: 2, GPU: 8}, max_workers: 2}\n")
    assert capacity.whole_cluster() == {"CPU": 24, "GPU": 18}
    assert capacity.slots({"CPU": 1, "GPU": 4}) == 4
    assert capacity.slots({"CPU": 4, "GPU": 1}) == 6
    # On machines of one's own Ray writes no resources: those of the nodes that are there count.
    path.write_text(
        path.read_text()
        .replace("{CPU: 0}", "{}")
        .replace("{CPU: 8, GPU: 2}", "{}")
        .replace("{CPU: 2, GPU: 8}", "{}")
    )
    assert capacity.slots({"CPU": 4}) == 2


def test_the_token_of_a_private_cluster_is_its_owners_alone(monkeypatch, tmp_path):
    path = tmp_path / "ray" / "auth_token"
    monkeypatch.setattr(session, "TOKEN", path)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    session._hide_token()
    token = path.read_text()
    assert len(bytes.fromhex(token)) == 32
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    session._hide_token()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text() == token


STRANGER = """
import sys, ray
try:
    ray.init(sys.argv[1], logging_level="ERROR", log_to_driver=False)
    print("in", ray.get(ray.remote(lambda: 1).remote()))
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_nobody_without_the_token_gets_into_a_private_cluster(monkeypatch):
    """Nor another user of the machine into its folders."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with session.ray_session({"CPU": 1}, asked="this test", remedy="take a core"):
        address = ray.get_runtime_context().gcs_address
        folder = Path(ray._private.worker._global_node.get_session_dir_path())
        strangers = {}
        for name, own in {
            "none": {"RAY_AUTH_MODE": "disabled"},
            "wrong": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
            "ours": {"RAY_AUTH_MODE": "token"},
        }.items():
            command = [sys.executable, "-c", STRANGER, address]
            strangers[name] = subprocess.Popen(
                command, stdout=subprocess.PIPE, text=True, env={**os.environ, **own}
            )
        said = {name: process.communicate(timeout=120)[0] for name, process in strangers.items()}
    assert said["ours"] == "in 1\n"
    # Ray tells them that there is no cluster, or that the token is wrong.
    assert all("Error" in said[name] and "in 1" not in said[name] for name in ("none", "wrong"))
    assert session.TOKEN.expanduser().stat().st_mode & 0o077 == 0
    above = [folder, *folder.parents]
    ours = above[: above.index(Path(tempfile.gettempdir()))]
    assert any(one.stat().st_mode & 0o077 == 0 for one in ours)


@pytest.mark.slow
def test_what_outlives_a_private_cluster_is_ended(monkeypatch):
    """As a process of Ray's may that hangs in its own exit; the driver's own children live on."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def leave():
        child = subprocess.Popen(["sleep", "300"], start_new_session=True)
        return child.pid, os.environ[session.MARK]

    with session.ray_session({"CPU": 1}, asked="this test", remedy="take a core"):
        node = ray._private.worker._global_node
        assert "log_monitor" not in node.all_processes
        left, mark = ray.get(ray.remote(leave).remote())
        own = subprocess.Popen(["sleep", "300"])
        assert left in session._marked(mark)
    # Nobody may have fetched its exit code yet.
    ended = left not in psutil.pids() or psutil.Process(left).status() == psutil.STATUS_ZOMBIE
    lives = own.poll() is None
    own.kill()
    own.wait()
    assert ended and lives and session.MARK not in os.environ


OTHER = """
import ray
ray.init(address="local", num_cpus=1, object_store_memory=80_000_000, include_dashboard=False)
print("up", flush=True)
input()
"""


@pytest.mark.slow
def test_cleaners_find_their_cluster_beside_another(monkeypatch):
    # They ask as Ray's do for an ended run of Train, whose cores would else stay taken.
    monkeypatch.setenv("RAY_GCS_SERVER_PORT", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = dict(os.environ)
    with subprocess.Popen(
        [sys.executable, "-c", OTHER],
        env={name: value for name, value in before.items() if name != "RAY_GCS_SERVER_PORT"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        try:
            assert other.stdout.readline() == "up\n"
            with session.ray_session({"CPU": 1}, asked="a", remedy="b", dashboard=True):
                assert {n: os.environ.get(n) for n in ("RAY_GCS_SERVER_PORT", "RAY_ADDRESS")} == {
                    "RAY_GCS_SERVER_PORT": "1",
                    "RAY_ADDRESS": None,
                }

                @ray.remote(num_cpus=0)
                class Idle:
                    def name(self):
                        return ray.get_runtime_context().get_actor_id()

                @ray.remote(num_cpus=0)
                def is_seen(actor):
                    from ray.train.v2._internal.state.util import is_actor_alive

                    return is_actor_alive(actor, timeout=10)

                idle = Idle.remote()
                assert ray.get(is_seen.remote(ray.get(idle.name.remote())))
        finally:
            other.communicate("\n")


WAITING = """
import sys, time
from mlvicx_dist import cli
from mlvicx_dist.session import ray_session

def wait(options):
    with ray_session({"CPU": 1}, asked="this", remedy="wait"):
        print("ready", file=sys.stderr, flush=True)
        time.sleep(60)

cli._demo = wait
sys.exit(cli.main(["demo"]))
"""


@pytest.mark.slow
def test_sigterm_ends_a_command_in_one_line_and_its_cluster_with_it(tmp_path):
    """Ray's own handler would print a stack and abort; TMPDIR is too long for a socket's path."""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", WAITING]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        said = process.stderr.readline()
        assert said == "ready\n"
        started = psutil.Process(process.pid).children(recursive=True)
        assert started
        process.terminate()
        assert process.stderr.read() == "mlvicx: stopped\n"
    assert process.returncode == 128 + signal.SIGTERM
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not alive


def test_a_ray_that_does_not_start_is_one_sentence(monkeypatch):
    def init(**given):
        raise Exception("The current node timed out during startup. More words.\nMore lines.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ResourceError, match=r"not start on this machine \(The .* words\); see"):
        with session.ray_session({"CPU": 1}, asked="a", remedy="b"):
            pass
