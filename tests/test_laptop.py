"""cluster/laptop.sh: nodes that come, die and leave nothing behind."""

import json
import os
import subprocess
import sys
import time

import pytest

SEE = """
import json, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
ray.init(log_to_driver=False, logging_level="ERROR")

@ray.remote(num_cpus=1)
def address():
    return ray.util.get_node_ip_address()

def on(node):
    affinity = NodeAffinitySchedulingStrategy(node, soft=False)
    return address.options(scheduling_strategy=affinity).remote()

alive = {n["NodeID"]: n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"]}
assert ray.get([on(node) for node in alive]) == list(alive.values())
print(json.dumps(sorted(alive.values())))
"""

WAIT = """
import sys, time, ray
ray.init(log_to_driver=False, logging_level="ERROR")
print("connected", flush=True)
while any(n["Alive"] for n in ray.nodes() if n["NodeID"] == sys.argv[1]):
    time.sleep(0.1)
"""

FOREIGN = """
import ray
ray.init(address="local", num_cpus=1, object_store_memory=100 * 2**20, include_dashboard=False)

@ray.remote
class Counter:
    n = 0

    def next(self):
        self.n += 1
        return self.n

counter = Counter.remote()
print(ray.get(counter.next.remote()), flush=True)
input()
print(ray.get(counter.next.remote()), flush=True)
"""


def python(code, *arguments, env):
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def seen(laptop):
    return json.loads(python(SEE, env=laptop.env).communicate(timeout=120)[0])


@pytest.mark.slow
@pytest.mark.alone
def test_nodes_come_die_and_leave_nothing(laptop):
    foreign = python(FOREIGN, env={})
    assert foreign.stdout.readline() == "1\n"

    laptop.up(2, cpus=1)
    head, second = (laptop.nodes[n][0] for n in (1, 2))
    assert second == "127.0.0.2"
    assert seen(laptop) == sorted([head, "127.0.0.2"])
    again = laptop.run("up", check=False)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "up already" in again.stderr

    laptop.add()
    assert seen(laptop) == sorted([head, "127.0.0.2", "127.0.0.3"])

    waiting = python(WAIT, laptop.nodes[2][1], env=laptop.env)
    assert waiting.stdout.readline() == "connected\n"
    laptop.kill(2)
    killed = time.monotonic()
    assert waiting.wait(timeout=60) == 0
    assert time.monotonic() - killed < 15
    assert seen(laptop) == sorted([head, "127.0.0.3"])
    assert "is not up" in laptop.run("kill", 2, check=False).stderr

    # One without work leaves when it is given notice.
    waiting = python(WAIT, laptop.nodes[3][1], env=laptop.env)
    laptop.drain(3, 60)
    assert waiting.wait(timeout=30) == 0
    assert seen(laptop) == [head]

    assert laptop.processes() != []
    laptop.down()
    assert laptop.processes() == []
    assert not laptop.folder.exists()
    assert foreign.communicate("\n", timeout=60)[0] == "2\n"


def test_down_when_nothing_is_up(laptop):
    done = laptop.run("down")
    assert done.stdout == ""
    assert done.stderr == f"No cluster is up in {laptop.folder}.\n"


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("upp",),
        ("up", "2", "3"),
        ("kill",),
        ("drain", "2"),
        ("up", "--cpu", "2"),
    ],
)
def test_what_is_no_command_gets_the_usage(laptop, arguments):
    done = laptop.run(*arguments, check=False)
    assert done.returncode == 2
    assert "usage: cluster/laptop.sh" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("up", "0"), "NODES is a whole number from 1, not '0'."),
        (("up", "two"), "NODES is a whole number from 1, not 'two'."),
        (("up", "--cpus", "0.5"), "--cpus is a whole number from 1, not '0.5'."),
        (("up", "--port", "80"), "--port is a whole number from 1024, not '80'."),
        (("drain", "2", "1m"), "SECONDS is a whole number from 0, not '1m'."),
    ],
)
def test_what_is_no_number_is_one_sentence(laptop, arguments, sentence):
    done = laptop.run(*arguments, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"laptop.sh: {sentence}\n"


@pytest.mark.parametrize("arguments", [("status",), ("add",), ("kill", "2"), ("drain", "2", "10")])
def test_without_a_cluster_there_is_nothing_to_act_on(laptop, arguments):
    done = laptop.run(*arguments, check=False)
    assert done.returncode == 1
    assert "is up in" in done.stderr or "is not up in" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_folder_too_long_for_a_socket_is_refused(laptop, monkeypatch):
    monkeypatch.setattr(laptop, "folder", laptop.folder / ("long" * 10))
    done = laptop.run("up", check=False)
    assert done.returncode == 2
    assert "too long for a socket's path" in done.stderr
    assert not laptop.folder.exists()
