"""`ray up cluster/gpu.yaml` against a stand-in for AWS whose instances are one Machine."""

import os
import subprocess
import sys
import time

import pytest
import yaml
from machines import LAPTOP, ROOT, run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

PORT = 25555
WANT_GPU = """
import ray
ray.init(log_to_driver=False)

@ray.remote(num_gpus=1)
def work():
    return 1

ray.get(work.remote(), timeout=300)
"""


@pytest.fixture
def aws(lan, monkeypatch):
    """boto3's clients, machines, and the environment in which both see the stand-in."""
    import boto3

    url = f"http://{LAPTOP}:{PORT}"
    env = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", LAPTOP, "-p", str(PORT)],
        env={**os.environ, "MOTO_IAM_LOAD_MANAGED_POLICIES": "true"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 60
        while True:
            try:
                boto3.client("ec2").describe_instances()
                break
            except Exception:
                assert time.monotonic() < end, "the stand-in did not start"
                time.sleep(0.5)
        yield boto3.client, lan, env
    finally:
        server.kill()
        server.wait()


def instances(client):
    """Those that run, by their kind in the cluster file."""
    found = {}
    for reservation in client("ec2").describe_instances()["Reservations"]:
        for one in reservation["Instances"]:
            if one["State"]["Name"] in ("pending", "running"):
                tags = {tag["Key"]: tag["Value"] for tag in one["Tags"]}
                found.setdefault(tags["ray-user-node-type"], []).append((one, tags))
    return found


def test_roles_head_workers_on_demand_and_down(aws):
    client, lan, env = aws
    client("cloudformation").create_stack(
        StackName="mlvicx-roles",
        TemplateBody=(ROOT / "cluster" / "aws-roles.yaml").read_text(),
        Parameters=[{"ParameterKey": "Bucket", "ParameterValue": "radiographs"}],
        Capabilities=["CAPABILITY_NAMED_IAM"],
    )
    roles = {role["RoleName"] for role in client("iam").list_roles()["Roles"]}
    assert {"mlvicx-head", "mlvicx-worker"} <= roles

    [machine] = lan.add(1)
    # Whatever address an instance is given leads to our machine.
    run("ip", "route", "add", "172.31.0.0/16", "via", machine.address)
    inside = ["nsenter", "-t", machine.process.pid, "-n"]
    run(*inside, "ip", "route", "add", "local", "172.31.0.0/16", "dev", "lo")
    (machine.home / ".bashrc").write_text(
        "".join(f"export {key}={value}\n" for key, value in env.items())
    )

    tree = yaml.safe_load((ROOT / "cluster" / "gpu.yaml").read_text())
    client("ec2").import_key_pair(
        KeyName="test", PublicKeyMaterial=(lan.folder / "key.pub").read_bytes()
    )
    image = client("ec2").describe_images()["Images"][0]["ImageId"]
    tree["provider"]["use_internal_ips"] = True
    tree["auth"] = {"ssh_user": "root", "ssh_private_key": lan.key}
    for kind in tree["available_node_types"].values():
        assert kind["node_config"]["ImageId"].startswith("resolve:ssm:/aws/service/")
        kind["node_config"] |= {"ImageId": image, "KeyName": "test"}
    file = lan.folder / "gpu.yaml"
    file.write_text(yaml.safe_dump(tree))
    home = lan.folder / "laptop"
    home.mkdir()
    own = {
        **os.environ,
        "HOME": str(home),
        "PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
    }

    def ray(*arguments):
        return run("ray", *arguments, env=own, cwd=ROOT, timeout=300)

    ray("get-auth-token", "--generate")
    ray("up", "-y", "--no-config-cache", file)
    found = instances(client)
    assert set(found) == {"head"}
    head, tags = found["head"][0]
    assert head["IamInstanceProfile"]["Arn"].endswith("/mlvicx-head")
    assert tags["ray-cluster-name"] == "mlvicx"
    # Only SSH comes in from outside.
    group = client("ec2").describe_security_groups(GroupIds=[head["SecurityGroups"][0]["GroupId"]])[
        "SecurityGroups"
    ][0]
    outside = [rule for rule in group["IpPermissions"] if rule["IpRanges"]]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in outside] == [(22, 22)]
    settings = yaml.safe_load(machine.do("cat ~/ray_bootstrap_config.yaml"))
    assert settings["available_node_types"]["gpu"]["resources"]["GPU"] == 4

    # A task that wants a GPU makes the head ask for a machine.
    (machine.own / "tmp" / "want.py").write_text(WANT_GPU)
    machine.do("nohup python /tmp/want.py >/dev/null 2>&1 &")
    end = time.monotonic() + 120
    while "gpu" not in instances(client):
        assert time.monotonic() < end, machine.do("tail -20 /tmp/ray/session_latest/logs/monitor*")
        time.sleep(1)
    worker, _ = instances(client)["gpu"][0]
    assert worker["InstanceLifecycle"] == "spot"
    assert worker["IamInstanceProfile"]["Arn"].endswith("/mlvicx-worker")
    assert worker["InstanceType"] == "g6.12xlarge"

    ray("down", "-y", file)
    assert instances(client) == {}
