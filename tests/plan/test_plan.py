"""`mlvicx plan`: what it tells, what it refuses, and its CPU prediction against real steps."""

import json
import re
import time
from pathlib import Path

import pytest
import torch

from mlvicx_dist.cli import main
from mlvicx_dist.config import PretrainConfig, load_as, parse_config, to_tree
from mlvicx_dist.errors import ResourceError
from mlvicx_dist.plan import command
from mlvicx_dist.plan.command import make_plan
from mlvicx_dist.plan.estimate import Group, estimate
from mlvicx_dist.plan.rates import measure
from mlvicx_dist.plan.request import Request
from mlvicx_dist.plan.work import count_work, exchange_of
from mlvicx_dist.train import rates
from mlvicx_dist.train.memory import needed_bytes
from mlvicx_dist.train.rates import training_step

ROOT = Path(__file__).parents[2]
CLUSTER = str(ROOT / "cluster" / "gpu.yaml")
L4 = Request(gpu_type="L4", gpus=4, images=1000)


def test_a_plan_in_json_holds_together(file, capsys):
    command = ["plan", file(), "--gpu-type", "L4", "--gpus", "3", "--images", "1000"]
    assert main([*command, "--price-per-hour", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["gpus"], told["machines"], told["images_a_gpu"]) == (3, 1, 3)
    assert told["steps"] == 3 * (1000 // 7)
    assert told["exchange"]["gradient_bytes"] == 4 * told["trained_parameters"]
    assert told["images_per_s"] == pytest.approx(7 / told["step_s"])
    assert told["hours"] == pytest.approx(told["steps"] * told["step_s"] / 3600)
    assert told["cost"] == pytest.approx(told["hours"] * 3 * 2)
    parts = told["seconds"]
    loader = parts.pop("loader")
    assert told["step_s"] == pytest.approx(max(sum(parts.values()), loader))
    assert told["standing_bytes"] < told["needed_bytes"] < told["memory_bytes"] < 24e9
    # So small a model is done before the host has started its operations.
    assert told["bottleneck"] == "launches"


def test_machines_are_paid_whole(file, capsys):
    """Seven GPUs are those of two machines of four."""
    command = ["plan", file(), "--cluster", CLUSTER, "--gpus", "7", "--images", "1000", "--json"]
    assert main([*command, "--price-per-hour", "2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["cost"] == pytest.approx(told["hours"] * 8 * 2)


def test_lines_tell_what_takes_the_time_and_every_assumption(file, capsys):
    assert main(["plan", file(), "--cluster", CLUSTER, "--gpus", "7", "--images", "1000"]) == 0
    out = capsys.readouterr().out
    for words in (
        "7 x L4 in 2 machines",
        "bottleneck  ",
        "Assumed:",
        f"- {CLUSTER}: 4 g6.12xlarge at most, which can be taken away, each with 4 L4",
        "50% of its 121 TFLOP/s in bf16",
        "no shards are here to be read",
        "the projectors' gradients or rows pass beside the backward",
    ):
        assert words in out
    assert "cost" not in out


def test_shards_tell_how_many_images_there_are_and_how_fast_they_load(
    config, phantom_shards, monkeypatch
):
    monkeypatch.setattr(rates, "LOADING_S", 0.1)
    settings = config(phantom_shards)
    plan = make_plan(settings, Request(gpu_type="L4"))
    manifest = json.loads((phantom_shards / "manifest.json").read_text())
    train = [shard for shard in manifest["shards"] if shard["split"] == "train"]
    images = sum(shard["samples"] for shard in train)
    assert (plan.loading.images, plan.steps) == (images, 3 * (images // 7))
    assert plan.loading.image_bytes == sum(shard["bytes"] for shard in train) / images
    assert plan.loading.images_per_s != command.LOADER_IMAGES_PER_S
    # Of an epoch, not of the shards.
    tree = to_tree(settings)
    tree["data"]["shards"] = [{"path": str(phantom_shards), "weight": w} for w in (1, 0.1)]
    weighted = make_plan(parse_config(tree, "t"), Request(gpu_type="L4"))
    assert weighted.loading.images == images + int(images * 0.1)
    # Other images than these, in a batch that these could not fill.
    other = make_plan(config(phantom_shards, train__batch_size=64), L4)
    assert (other.loading.images, other.steps) == (1000, 3 * 15)


def test_a_store_is_not_asked_where_the_images_are_told(config):
    began = time.monotonic()
    plan = make_plan(config("s3://no-such-bucket-of-ours/shards"), L4)
    assert plan.loading.images == 1000
    assert time.monotonic() - began < 20


def test_with_few_loader_processes_the_loader_is_the_bottleneck(config, monkeypatch):
    monkeypatch.setattr(command, "LOADER_IMAGES_PER_S", 100.0)
    few = make_plan(config(data__loader_workers=1, train__batch_size=256), L4)
    assert few.seconds.bottleneck == "loader"
    assert few.images_per_s == pytest.approx(4 * 100)
    [told] = [line for line in few.lines() if line.startswith("bottleneck")]
    enough = int(re.search(r"(\d+) processes a worker would keep up", told)[1])
    assert 64 / (100 * enough) <= few.seconds.computing < 64 / (100 * (enough - 1))
    monkeypatch.setattr(command, "LOADER_IMAGES_PER_S", 10_000.0)
    # 48 cores and 4 GPUs: 11 of 64 processes have a core.
    many = make_plan(
        config(data__loader_workers=64, train__batch_size=256),
        Request(cluster=CLUSTER, gpus=4, images=1000),
    )
    assert many.seconds.bottleneck != "loader"
    assert many.loading.processes == 11


def test_a_slow_network_makes_the_gradients_the_bottleneck(config):
    wide = config(train__batch_size=64, model__projector={"width": 2048})
    found = [
        make_plan(
            wide, Request(gpu_type="L4", gpus=4, gpus_per_node=1, network_gbit=g, images=1000)
        ).seconds
        for g in (1, 10_000)
    ]
    assert found[0].bottleneck == "gradients"
    assert found[1].gradients < found[0].gradients / 10


def test_what_does_not_fit_is_refused_with_ways_that_do(config, monkeypatch):
    settings = config(train__batch_size=1024, views__image_size_px=96)
    monkeypatch.setattr(command, "PROCESS_BYTES", int(23.5e9))
    request = Request(gpu_type="L4", images=10_000)
    with pytest.raises(ResourceError) as caught:
        make_plan(settings, request)
    told = str(caught.value)
    assert told.startswith("each of 1 workers would hold 1024 images and need about ")
    gpus, batch = map(
        int, re.search(r"--gpus (\d+) or lower train.batch_size to (\d+)", told).groups()
    )
    there = 24e9 - command.PROCESS_BYTES

    def fits(size, workers):
        train = settings.train.model_copy(update={"batch_size": size})
        rows = -(-size // workers)
        return needed_bytes(settings.model_copy(update={"train": train}), rows, gpu=True) <= there

    assert fits(1024, gpus) and fits(batch, 1)
    # And not much less than what would.
    assert not fits(batch + batch // 8, 1)


def test_a_plan_for_this_cpu_times_it(config):
    plan = make_plan(config(), Request(images=1000))
    assert plan.device == "this machine's CPU"
    assert plan.group.workers == 1 and plan.seconds.step > 0.001
    # No more images than the batch has, and no fewer than batch norm takes.
    [told] = [line for line in plan.assumed if "images a view on 1 threads here" in line]
    assert 2 <= int(re.search(r"of (\d+) images", told)[1]) <= 7


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nowhere: there is no such folder of shards; pack one with a script of sharding/, or"),
        (["--gpu-type", "H10", "--images", "9"], "this GPU is not known (did you mean 'H100'?)"),
        (["--gpus", "0"], "--gpus is 0; give 1 or more"),
        (["--gpus", "-1"], "--gpus is -1; give 1 or more"),
        (["--gpus-per-node", "0"], "--gpus-per-node is 0; give 1 or more"),
        (["--images", "0"], "--images is 0; give 1 or more"),
        (["--images", "6", "--gpus", "1"], "the batch of 7 is larger than the 6 images"),
        (["--price-per-hour", "-1"], "--price-per-hour is -1; give 0 or more"),
        (["--price-per-hour", "nan"], "--price-per-hour is nan; give 0 or more"),
        (["--network-gbit", "0"], "--network-gbit is 0; give more than 0"),
        (["--gpus", "8"], "--gpus is 8, but a batch of 7 images cannot be shared"),
        (["--cluster", "/nowhere.yaml"], "/nowhere.yaml: the cluster file cannot be read"),
        (["--cluster", CLUSTER, "--gpu-type", "T4"], "has L4s, but --gpu-type is T4; leave out"),
        (
            ["--cluster", CLUSTER, "--gpu-type", "cpu"],
            "a cluster is planned by its GPUs; leave out",
        ),
        (
            ["--cluster", CLUSTER, "--gpus", "17", "--set", "train.batch_size=64"],
            "it grows to 4 g6.12xlarge with 16 GPUs in all, but 17 are asked for",
        ),
        (
            ["--cluster", str(ROOT / "cluster" / "onprem.yaml"), "--gpu-type", "L4"],
            "it does not tell the GPUs of its machines of its own; give --gpu-type and",
        ),
        (["--set", "workers.use_gpu=true"], "--gpu-type is missing; give one such as L4"),
        (
            ["--gpu-type", "T4", "--images", "9", "--set", "train.precision=bf16"],
            "train.precision is bf16, which T4 computes in software only",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_two(file, arguments, words, capsys):
    assert main(["plan", file(), *arguments]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert words in streams.err
    assert len(streams.err.strip().splitlines()) == 1


def test_settings_of_another_kind_are_refused(capsys):
    assert main(["plan", str(ROOT / "configs" / "sweep" / "smoke.yaml")]) == 2
    assert "this command takes 'kind: pretrain'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "side", "rows"), [("resnet18", 96, 16), ("resnet18", 224, 6), ("resnet50", 128, 6)]
)
@pytest.mark.alone
def test_a_step_on_this_cpu_takes_what_was_foretold_within_a_quarter(backbone, side, rows):
    """By the time of this process, on one thread, the least of three: what else runs only adds."""
    settings = load_as(
        PretrainConfig,
        ROOT / "configs" / "pretrain" / "default.yaml",
        [
            f"model.backbone={backbone}",
            f"views.image_size_px={side}",
            f"train.batch_size={rows}",
            "train.precision=float32",
            "workers.cpus_per_worker=1",
        ],
    )
    work, step = count_work(settings, rows), training_step(settings, rows, torch.device("cpu"))
    step()
    taken, foretold = [], []
    for _ in range(3):
        began = time.process_time()
        step()
        taken.append(time.process_time() - began)
        foretold.append(
            estimate(
                work,
                exchange_of(work, rows),
                measure(settings, rows, clock=time.process_time),
                Group(1, 1, 1, 1, 0, 0),
                launch_s=0,
                loader_images_per_s=1e9,
            ).step
        )
    assert min(foretold) == pytest.approx(min(taken), rel=0.25)
