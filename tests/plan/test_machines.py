"""GPUs by name, machines against Amazon's own record, and the cluster files of this repository."""

import gzip
import json
import re
from pathlib import Path

import pytest

from mlvicx_dist.errors import ConfigError
from mlvicx_dist.plan.machines import GPUS, NODES, Cluster, gpu_named, read_cluster

CLUSTER = Path(__file__).parents[2] / "cluster"


def test_a_gpu_is_found_whatever_its_case_and_a_wrong_one_names_the_nearest():
    assert gpu_named("h100") is GPUS["H100"]
    with pytest.raises(
        ConfigError, match=r"--gpu-type A1000: this GPU is not known \(did you mean"
    ):
        gpu_named("A1000")
    with pytest.raises(ConfigError, match="known are T4, V100, A10G"):
        gpu_named("abacus")


def test_amazons_machines_are_as_amazon_describes_them():
    moto = pytest.importorskip("moto")
    record = Path(moto.__file__).parent / "ec2" / "resources" / "instance_types.json.gz"
    types = json.loads(gzip.decompress(record.read_bytes()))
    known = {name: node for name, node in NODES.items() if name in types}
    assert len(known) == sum("." in name for name in NODES)
    for name, node in known.items():
        [gpu] = types[name]["GpuInfo"]["Gpus"]
        network = re.fullmatch(
            r"(?:(\d)x )?(\d+) Gigabit", types[name]["NetworkInfo"]["NetworkPerformance"]
        )
        assert node.gpu.startswith(gpu["Name"])
        assert node.gpus == gpu["Count"]
        assert node.cores == types[name]["VCpuInfo"]["DefaultVCpus"]
        assert node.network_gbit == int(network[1] or 1) * int(network[2])
        # A GPU keeps some of its memory for itself.
        there = gpu["MemoryInfo"]["SizeInMiB"] * 2**20
        assert GPUS[node.gpu].memory_gb * 1e9 == pytest.approx(there, rel=0.08)


@pytest.mark.parametrize(
    ("name", "cluster"),
    [
        ("gpu.yaml", Cluster("g6.12xlarge", 4, NODES["g6.12xlarge"], 4, spot=True)),
        ("gcp.yaml", Cluster("g2-standard-48", 4, NODES["g2-standard-48"], 4, spot=True)),
        ("onprem.yaml", Cluster("machines of its own", 2)),
        ("kuberay-job.yaml", Cluster("pods", 4, gpus=1)),
    ],
)
def test_each_cluster_file_tells_its_machines(name, cluster):
    assert read_cluster(CLUSTER / name) == cluster


def test_machines_on_demand_are_told_from_spot(tmp_path):
    text = (CLUSTER / "gpu.yaml").read_text().replace("{MarketType: spot}", "{}")
    (tmp_path / "gpu.yaml").write_text(text.replace("most 4", "most 3"))
    found = read_cluster(tmp_path / "gpu.yaml")
    assert (found.nodes, found.spot) == (3, False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "the cluster file cannot be read"),
        ("a: [", "cluster.yaml, line 1"),
        ("[1, 2]", "it names no machines for workers"),
        ("provider: {type: aws}", "it names no machines for workers"),
        (
            "provider: {type: aws}\nhead_node_type: h\nmax_workers: 1\n"
            "available_node_types: {h: {node_config: {}}}",
            "it names no machines for workers",
        ),
        (
            (CLUSTER / "gpu.yaml").read_text().replace("max_workers: ", "max_workers: .inf #"),
            "it names no machines for workers",
        ),
        (
            "kind: RayJob\nspec: {rayClusterSpec: {workerGroupSpecs: [{replicas: 1, "
            "template: {spec: {containers: []}}}]}}",
            "it names no machines for workers",
        ),
    ],
)
def test_a_file_that_is_none_is_one_sentence(tmp_path, text, words):
    path = tmp_path / "cluster.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(words)):
        read_cluster(path)
