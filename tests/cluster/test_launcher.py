"""`ray up cluster/onprem.yaml` on three machines, the jobs of a working day, and `ray down`."""

import json
import os
import re
import subprocess
import time
import urllib.error
import urllib.request

import pytest
import yaml
from machines import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

WHERE = """
import ray, mlvicx_dist
ray.init(log_to_driver=False)

@ray.remote
def there():
    import mlvicx_dist
    return mlvicx_dist.__file__

print("driver", mlvicx_dist.__file__)
print("task", ray.get(there.remote()))
"""
EVALUATE = """\
kind: evaluate
name: small
data: {{shards: [{folder}/shards]}}
"""


class Launched:
    """A cluster of machines of one's own, as its user sees it: from a laptop, through Ray."""

    def __init__(self, lan, machines):
        self.lan, self.machines = lan, machines
        self.home = lan.folder / "laptop"
        self.home.mkdir()
        self.env = {
            **os.environ,
            "HOME": str(self.home),
            "PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_API_SERVER_ADDRESS": "http://localhost:8265",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.file = lan.folder / "onprem.yaml"
        tree = yaml.safe_load((ROOT / "cluster" / "onprem.yaml").read_text())
        head, *workers = [machine.address for machine in machines]
        tree["provider"] |= {"head_ip": head, "worker_ips": workers}
        tree["auth"] = {"ssh_user": "root", "ssh_private_key": lan.key}
        # Three Rays on one machine's memory.
        for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
            tree[commands] = [
                line.replace("ray start", "ray start --object-store-memory 134217728")
                for line in tree[commands]
            ]
        self.file.write_text(yaml.safe_dump(tree))

    def ray(self, *arguments, check=True, **env):
        done = subprocess.run(
            ["ray", *map(str, arguments)],
            cwd=ROOT,
            env={**self.env, **env},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def up(self):
        self.ray("get-auth-token", "--generate")
        self.ray("up", "-y", self.file)
        self.forward = subprocess.Popen(
            ["ray", "dashboard", str(self.file)],
            cwd=ROOT,
            env=self.env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.until(lambda: self.alive() == len(self.machines), 180, "all nodes")
        self.until(lambda: "job" in self.ray("job", "list", check=False).stdout.lower(), 60, "jobs")

    def alive(self):
        said = self.machines[0].do("ray list nodes --filter state=ALIVE --format json 2>/dev/null")
        return len(json.loads(said[said.index("[") :]))

    def down(self):
        self.ray("down", "-y", self.file)
        self.forward.terminate()
        self.forward.wait()

    def job(self, *arguments, wait=True, check=True, name=None):
        """Submit a job; what it and Ray said."""
        options = [] if wait else ["--no-wait"]
        options += ["--submission-id", name] if name else []
        command = ["python", "-m", "mlvicx_dist", *map(str, arguments)]
        return self.ray(
            "job", "submit", *options, "--working-dir", ".", "--", *command, check=check
        )

    def until(self, true, within, what):
        end = time.monotonic() + within
        while not true():
            assert time.monotonic() < end, f"no {what} within {within} s"
            time.sleep(0.5)

    def losses(self, name):
        log = self.lan.folder / "runs" / name / "metrics.jsonl"
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def cluster(lan):
    launched = Launched(lan, lan.add(3))
    launched.up()
    yield launched
    launched.down()
    # Ray stops the head; the others end when they have not heard of it for a minute.
    for machine in launched.machines:
        launched.until(lambda m=machine: "raylet" not in m.do("ps -eo comm"), 150, "end")


def test_only_ssh_and_the_cluster_itself_can_be_reached(cluster):
    """The dashboard listens on the head's localhost, the client server not at all."""
    doors = cluster.machines[0].do("ss -Hltn")
    assert "127.0.0.1:8265" in doors and ":10001" not in doors
    assert not re.search(r"(0\.0\.0\.0|\*|10\.77\.0\.1):8265", doors)
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen("http://localhost:8265/api/jobs/")
    stranger = cluster.ray("job", "list", check=False, RAY_AUTH_TOKEN="0" * 64)
    assert stranger.returncode


def test_a_command_runs_on_the_head(cluster):
    said = cluster.ray("exec", cluster.file, "ray status").stdout
    assert "6.0 CPU" in said


def test_doctor_looks_at_every_node(cluster):
    said = cluster.job("doctor", cluster.lan.config("look", workers=3)).stdout
    assert "ok    nodes       10.77.0.1, 10.77.0.2, 10.77.0.3: 6 cores" in said
    assert "GB/s all-reduced between nodes" in said and "room for 3" in said
    assert "bad " not in said


def test_the_uploaded_code_wins_over_an_installed_copy(cluster):
    said = cluster.ray("job", "submit", "--working-dir", ".", "--", "python", "-c", WHERE).stdout
    for who in ("driver", "task"):
        assert "runtime_resources" in re.search(rf"^{who} (.*)$", said, re.MULTILINE)[1]


def test_first_step_within_a_minute(cluster, record_property):
    config = cluster.lan.config("first")
    began = time.time()
    cluster.job("pretrain", config)
    first = min(row["time"] for row in cluster.lan.groups("first")[0].steps[1])
    record_property("seconds", first - began)
    assert first - began < 60


def test_three_nodes_have_the_loss_curve_of_one(cluster):
    # AdamW's first updates are as large where a gradient is all rounding: docs/resume.md.
    lars = ["--set", "train.optimizer=lars"]
    for name, workers in (("one", 1), ("three", 3)):
        said = cluster.job("pretrain", cluster.lan.config(name, workers=workers), *lars).stdout
    assert len(cluster.losses("one")) > 5
    assert cluster.losses("three") == pytest.approx(cluster.losses("one"), rel=1e-4)
    assert {f"node{n}" for n in (1, 2, 3)} == set(re.findall(r"\d on (node\d)", said))


def test_sweep_and_evaluation_are_jobs_too(cluster):
    folder = cluster.lan.folder
    sweep = ["sweep", "configs/sweep/smoke.yaml", "--set", f"storage_path={folder}/sweeps"]
    sweep += ["--set", f"pretrain.data.shards.0.path={folder}/shards"]
    sweep += ["--set", "pretrain.train.batch_size=6", "--set", "target.images=16"]
    sweep += ["--set", "target.every_steps=2", "--set", "asha.grace_steps=2"]
    sweep += ["--set", "search.trials=2", "--set", "pretrain.model.backbone=test_resnet"]
    sweep += ["--set", "space={loss.lambda_local: {log_uniform: [0.1, 10]}}"]
    assert "best" in cluster.job(*sweep).stdout
    (folder / "evaluate.yaml").write_text(EVALUATE.format(folder=folder))
    cluster.job("pretrain", cluster.lan.config("judged"))
    said = cluster.job("evaluate", folder / "runs" / "judged", folder / "evaluate.yaml").stdout
    assert "untrained" in said


def test_an_error_is_a_sentence_and_an_exit_code(cluster):
    wrong = cluster.lan.config("wrong", workers=5)
    done = cluster.job("pretrain", wrong, check=False)
    assert done.returncode == 1
    assert "mlvicx: workers.num x workers.cpus_per_worker asks for 10 CPUs" in done.stdout
    assert "Traceback" not in done.stdout


def test_stop_saves_and_the_same_job_goes_on(cluster):
    config = cluster.lan.config("stopped", epochs=400)
    cluster.job("pretrain", config, wait=False, name="stopped")
    cluster.until(lambda: cluster.lan.step("stopped") >= 5, 90, "fifth step")
    cluster.ray("job", "stop", "stopped")
    cluster.until(lambda: cluster.lan.checkpoints("stopped"), 60, "checkpoint")
    reached = cluster.lan.step("stopped")
    cluster.job("pretrain", config, wait=False, name="again")
    cluster.until(lambda: cluster.lan.step("stopped") > reached + 2, 90, "step after the stop")
    assert abs(cluster.lan.groups("stopped")[-1].start - reached) <= 1
    # Meanwhile the same run is refused to another job, and another run is not.
    twice = cluster.job("pretrain", config, check=False)
    assert twice.returncode == 1 and "Traceback" not in twice.stdout
    cluster.job("pretrain", cluster.lan.config("beside", workers=1))
    assert "(rank 0 on node" in cluster.ray("job", "logs", "again").stdout
    cluster.ray("job", "stop", "again")


def test_a_node_that_is_cut_off_and_back(cluster):
    """The group goes on without it from its checkpoint, and takes it in again."""
    config = cluster.lan.config("cut", epochs=4000, workers=3)
    elastic = ["--set", "workers.min=2", "--set", "workers.resize_after_s=5"]
    elastic += ["--set", "workers.collective_timeout_s=20", "--set", "checkpoint.every_steps=10"]
    cluster.job("pretrain", config, *elastic, wait=False, name="cut")
    cluster.until(lambda: cluster.lan.step("cut") >= 20, 120, "twentieth step")
    third = cluster.machines[2]
    third.unplug()
    cluster.until(lambda: cluster.lan.groups("cut")[-1].world_size == 2, 180, "group of two")
    cluster.until(lambda: cluster.lan.step("cut") >= 40, 120, "step of two")
    third.plug()
    cluster.until(lambda: cluster.lan.groups("cut")[-1].world_size == 3, 240, "group of three")
    cluster.ray("job", "stop", "cut")


def test_a_slow_cable_is_seen(cluster):
    cluster.machines[1].slow(200)
    said = cluster.job("doctor").stdout
    rate = float(re.search(r"([\d.e-]+) GB/s all-reduced", said)[1])
    assert rate < 0.05
