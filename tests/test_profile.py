"""`mlvicx profile`: the parts of a step of two workers, and a trace that can be opened."""

import gzip
import json
import time
from types import SimpleNamespace

import pytest
import torch
from small import SMALL
from torch._C._autograd import DeviceType

from mlvicx_dist.cli import main
from mlvicx_dist.profile import Stopwatch, exchanged

PARTS = [
    "data wait",
    "transfer",
    "augment",
    "forward",
    "loss",
    "backward",
    "all-reduce",
    "optimizer",
]
RUN = """\
kind: pretrain
run: {{name: small, storage_path: {runs}}}
data: {{shards: [{{path: {shards}}}], loader_workers: 1}}
train: {{batch_size: 6, epochs: 1, optimizer: adamw}}
workers: {{num: 2}}
"""


@pytest.fixture
def config(phantom_shards, tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(RUN.format(runs=tmp_path / "runs", shards=phantom_shards) + SMALL)
    return path


@pytest.mark.slow
def test_where_the_time_of_a_step_goes(config, tmp_path, capsys):
    trace = tmp_path / "trace.json.gz"
    assert main(["profile", str(config), "--steps", "2", "--out", str(trace), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["parts_s"]) == PARTS
    # Between parts a step does next to nothing.
    assert sum(found["parts_s"].values()) == pytest.approx(found["step_s"], rel=0.2)
    assert found["images_per_s"] == pytest.approx(6 / found["step_s"])
    # Three for the loss, more for batch norm and gradients.
    assert found["collectives"]["count"] > 3
    assert found["collectives"]["seconds"] > 0
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert {event.get("name") for event in events} >= {*PARTS} - {"all-reduce"}
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("device", [DeviceType.CPU, DeviceType.CUDA])
def test_a_collective_counts_once(device):
    def event(name, microseconds, where):
        taken = SimpleNamespace(elapsed_us=lambda: microseconds)
        return SimpleNamespace(name=name, device_type=where, time_range=taken)

    on_gpu = [event("nccl:all_reduce", 300.0, device)] if device == DeviceType.CUDA else []
    host = [event("nccl:all_reduce", 50.0, DeviceType.CPU), event("aten::mm", 9.0, DeviceType.CPU)]
    calls, seconds = exchanged([*host, *on_gpu])
    assert (calls, seconds) == (1, pytest.approx(300e-6 if on_gpu else 50e-6))


def test_a_stopwatch_tells_steps_apart():
    watch = Stopwatch(torch.device("cpu"))
    for seconds in (0.02, 0.05):
        with watch("a"):
            time.sleep(seconds)
        with watch("b"):
            pass
        watch.split()
    (first, whole), (second, _) = watch.steps()
    assert 0.02 <= first["a"] <= whole
    assert second["a"] >= 0.05
    assert first["b"] < 0.01
    assert watch.steps() == []


def test_a_trace_that_cannot_be_written_is_one_sentence_before_anything_runs(config, capsys):
    assert main(["profile", str(config), "--out", "/absent/trace.json.gz"]) == 2
    said = capsys.readouterr().err.strip()
    assert said == (
        "mlvicx: /absent/trace.json.gz: the trace cannot be written (there is no folder /absent); "
        "give another path with --out."
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["workers.min=1"], "workers.min"),
        (["workers.num=7"], "workers.num is 7"),
        (["data.shards.0.path=/absent"], "/absent"),
    ],
)
def test_what_cannot_be_profiled_is_one_sentence(config, overrides, words, capsys):
    sets = [part for override in overrides for part in ("--set", override)]
    assert main(["profile", str(config), *sets]) == 2
    said = capsys.readouterr().err.strip()
    assert words in said
    assert len(said.splitlines()) == 1
