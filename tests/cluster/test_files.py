"""The files of cluster/ by themselves: their form, their pins, and what is not in them."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import jsonschema
import pytest
import yaml

from mlvicx_dist import capacity

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
LAUNCHED = ["gpu", "gcp", "onprem"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())


def loaded(name):
    return yaml.safe_load((CLUSTER / name).read_text())


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_takes_the_file(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(loaded(f"{name}.yaml")))


@pytest.mark.parametrize("name", LAUNCHED)
def test_doors_are_closed_and_versions_pinned(name):
    tree = loaded(f"{name}.yaml")
    assert tree["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert tree["file_mounts"]["~/mlvicx/constraints.txt"] == "constraints.txt"
    assert all((ROOT / p).is_file() for p in tree["file_mounts"].values() if p[0] != "~")
    assert [command.split()[:2] for command in tree["setup_commands"]] == [
        ["bash", "~/mlvicx/node.sh"]
    ]
    start = " ".join(tree["head_start_ray_commands"])
    assert "--dashboard-host 127.0.0.1" in start and "pkill -f '[r]ay.util.client" in start
    assert {"head_setup_commands", "worker_setup_commands", "initialization_commands"} <= set(tree)


def test_gpu_workers_are_bounded_and_the_head_does_not_train():
    for name in ("gpu", "gcp"):
        tree = loaded(f"{name}.yaml")
        kinds = tree["available_node_types"]
        assert kinds["head"]["resources"] == {"CPU": 0}
        assert kinds["gpu"]["max_workers"] == tree["max_workers"] and tree["idle_timeout_minutes"]
        assert kinds["gpu"]["min_workers"] == 0
        assert tree["provider"]["cache_stopped_nodes"] is False


@pytest.mark.parametrize("path", sorted(CLUSTER.iterdir()), ids=lambda path: path.name)
def test_no_secret_is_in_a_file(path):
    text = path.read_text()
    assert not re.search(r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|password|[0-9a-f]{40}", text)


def test_images_have_the_pinned_ray():
    assert loaded("kuberay-job.yaml")["spec"]["rayClusterSpec"]["rayVersion"] == PINS["ray"]
    assert f"rayproject/ray:{PINS['ray']}-py" in (CLUSTER / "Dockerfile").read_text()


def test_kuberay_takes_the_manifest():
    schema = yaml.safe_load((Path(__file__).parent / "rayjob.schema.yaml").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    tree = loaded("kuberay-job.yaml")
    jsonschema.validate(tree, schema)
    tree["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["rayStartParams"]["num-cpus"] = 12
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tree, schema)


def test_what_kuberay_may_add_counts(monkeypatch, tmp_path):
    """A head without cores and no worker yet: room is what the manifest's groups may grow to."""
    from ray.autoscaler._private.kuberay import node_provider

    asked = []
    cluster = {
        "metadata": {"name": "mlvicx", "namespace": "here"},
        "spec": loaded("kuberay-job.yaml")["spec"]["rayClusterSpec"],
    }

    class Kubernetes:
        def __init__(self, namespace):
            asked.append(namespace)

        def get(self, path):
            asked.append(path)
            return cluster

    monkeypatch.setattr(node_provider, "KubernetesHttpApiClient", Kubernetes)
    monkeypatch.setattr("ray._private.state.state.get_cluster_config", lambda: None)
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": 0.0}}])
    monkeypatch.setenv("RAY_CLUSTER_NAME", "mlvicx")
    monkeypatch.setattr(capacity, "POD_NAMESPACE", tmp_path / "namespace")
    (tmp_path / "namespace").write_text("here")
    assert capacity.slots({"CPU": 2, "GPU": 1}) == 4
    assert capacity.slots({"CPU": 24, "GPU": 1}) == 0
    assert asked[:2] == ["here", "rayclusters/mlvicx"]
    del cluster["spec"]["enableInTreeAutoscaling"]
    assert capacity.slots({"CPU": 2, "GPU": 1}) == 0


def test_a_job_uploads_code_and_settings_alone(tmp_path):
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    ours = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, ours):
        there = tmp_path / "repository" / name
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_bytes((ROOT / name).read_bytes())
    for private in ("patients/1.dcm", "patients.csv", "data/a.png", ".env", "mine.yaml"):
        there = tmp_path / "repository" / private
        there.parent.mkdir(exist_ok=True)
        there.write_text("x")
    package = tmp_path / "package.zip"
    create_package(
        str(tmp_path / "repository"),
        package,
        include_gitignore=True,
        excludes=get_runtime_env_default_excludes(),
    )
    assert package.stat().st_size < 5e6
    names = zipfile.ZipFile(package).namelist()
    assert {name.split("/")[0] for name in names} == {
        "benchmarks",
        "configs",
        "mine.yaml",
        "mlvicx_dist",
        "sharding",
    }
    assert "mlvicx_dist/report/templates/base.html.j2" in names
    assert "configs/pretrain/default.yaml" in names


def test_the_roles_are_well_formed_and_narrow():
    path = CLUSTER / "aws-roles.yaml"
    lint = [Path(sys.executable).parent / "cfn-lint", path]
    assert subprocess.run(lint, capture_output=True, text=True).stdout == ""
    for statement in re.findall(r"Action: (.*)", path.read_text()):
        assert '"*"' not in statement and "s3:*" not in statement and "iam:*" not in statement


@pytest.mark.parametrize("name", ["node.sh", "laptop.sh", "slurm.sbatch"])
def test_scripts_are_shell(name):
    subprocess.run(["bash", "-n", CLUSTER / name], check=True)
    text = (CLUSTER / name).read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in text
