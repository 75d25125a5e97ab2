"""The seconds of a step from numbers that can be followed by hand."""

from dataclasses import replace

import pytest
import timm
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mlvicx_dist.plan.estimate import Group, estimate
from mlvicx_dist.plan.machines import GPUS, Gpu
from mlvicx_dist.plan.rates import Measured, Roofline, measured
from mlvicx_dist.plan.work import Counter, Exchange, Op, Work

PLAIN = Gpu("plain", 2, 4, 1, 16, 1000 / 0.7, 32)
"""A TFLOP/s in bf16 and in TF32, half of one in float32, 1000 GB/s."""


def group(workers, per_node=8, **changes):
    rates = {
        "link_bytes_per_s": 100e9,
        "network_bytes_per_s": 10e9,
        "link_hop_s": 1e-6,
        "network_hop_s": 10e-6,
    }
    return Group(workers, per_node, **{**rates, **changes})


def work(**changes):
    """A second forward, two backward."""
    plain = {
        "rows": 32,
        "forward": (Op("mm", 1e12, 0, "bf16"),),
        "backward": (Op("mm", 2e12, 0, "bf16"),),
        "rest": (Op("mul", 0, 1e11),),
        "parameters": 10,
        "trained": 10,
        "gradient_bytes": 40,
        "early_bytes": 30,
        "widths": (4, 4),
    }
    return Work(**{**plain, **changes})


def seconds(workers=1, exchange=(0, 0, 0, 0, 0, 0), launch_s=0.0, loader=1e9, **changes):
    return estimate(
        work(),
        Exchange(*exchange),
        Roofline(PLAIN),
        group(workers, **changes),
        launch_s=launch_s,
        loader_images_per_s=loader,
    )


def test_a_ring_takes_twice_the_bytes_less_a_part():
    four = group(4)
    assert four.all_reduce_s(100e9) == pytest.approx(2 * 3 / 4)
    assert four.gather_s(100e9) == pytest.approx(3 / 4)
    # Between machines the network's rate counts, which all GPUs of a machine share.
    assert group(16).all_reduce_s(10e9) == pytest.approx(2 * 15 / 16)
    assert group(1).all_reduce_s(1e9) == group(1).gather_s(1e9) == 0


def test_a_small_part_goes_around_the_ring_and_a_small_sum_up_and_down_a_tree():
    assert group(8).gather_hops_s == pytest.approx(7e-6)
    assert group(16).gather_hops_s == pytest.approx(2 * 10e-6 + 13e-6)
    assert group(4, per_node=1).gather_hops_s == pytest.approx(3 * 10e-6)
    assert group(32).reduce_hops_s == pytest.approx(2 * (2 * 10e-6 + 7e-6))
    assert group(1).gather_hops_s == group(1).reduce_hops_s == 0


def test_an_operation_takes_the_longer_of_its_products_and_its_bytes():
    gpu = Roofline(PLAIN)
    assert gpu.seconds(Op("mm", 1e12, 1e9, "bf16")) == pytest.approx(1)
    assert gpu.seconds(Op("mm", 1e12, 1e9)) == pytest.approx(2)
    assert gpu.seconds(Op("convolution_backward", 1e12, 1e9)) == pytest.approx(1)
    assert gpu.seconds(Op("mm", 1e6, 1e12, "bf16")) == pytest.approx(1)
    assert gpu.bound(Op("mm", 1e12, 1e9)) == "arithmetic"
    assert gpu.bound(Op("mul", 0, 1e9)) == "memory"


def test_the_projectors_gradients_pass_beside_the_backward_and_the_others_beside_half_of_it():
    # 8 workers of one machine: 100 GB take 1.75 s, of which a second passes beside.
    assert seconds(8, (100 * 10**9, 0, 0, 0, 0, 0)).gradients == pytest.approx(0.75)
    assert seconds(8, (50 * 10**9, 0, 0, 0, 0, 0)).gradients == 0
    # What is ready at once takes 1.4 s of the 2 s, and what is ready after one second the rest.
    assert seconds(8, (100 * 10**9, 80 * 10**9, 0, 0, 0, 0)).gradients == 0
    assert seconds(8, (200 * 10**9, 160 * 10**9, 0, 0, 0, 0)).gradients == pytest.approx(1.5)
    # Rows are gathered beside it too: 0.875 s of 100 GB.
    assert seconds(8, (0, 0, 0, 0, 0, 0, 100 * 10**9)).gradients == 0
    assert seconds(8, (0, 0, 0, 0, 0, 0, 400 * 10**9)).gradients == pytest.approx(1.5)
    slow = seconds(8, (100 * 10**9, 0, 0, 0, 0, 0), link_bytes_per_s=10e9)
    assert slow.gradients == pytest.approx(16.5)
    assert slow.bottleneck == "gradients"
    assert slow.step == pytest.approx(3.1 + 16.5)


def test_on_a_cpu_gradients_pass_after_the_backward():
    found = seconds(8, (100 * 10**9, 80 * 10**9, 0, 0, 0, 0), beside=False)
    assert found.gradients == pytest.approx(1.75)


def test_the_exchange_of_the_loss_and_of_statistics_waits():
    found = seconds(8, (0, 0, 100 * 10**9, 100 * 10**9, 10, 20))
    assert found.embeddings == pytest.approx(1.75 + 0.875)
    assert found.statistics == pytest.approx(10 * 7e-6 + 20 * 14e-6)
    assert found.step == pytest.approx(3.1 + 2.625 + 35e-5)


def test_a_host_that_is_late_is_what_takes_the_time():
    found = seconds(launch_s=0.01)
    assert found.bottleneck == "launches"
    # Two operations, and 350 of what is summed up.
    assert found.step == pytest.approx(3.52)


def test_the_loader_works_beside_and_takes_over_where_it_is_slow():
    quick, slow = seconds(loader=32), seconds(loader=8)
    assert (quick.bottleneck, quick.step) == ("arithmetic", pytest.approx(3.1))
    assert (slow.bottleneck, slow.step) == ("loader", pytest.approx(4))


def test_a_cpu_takes_what_was_timed_by_name():
    ops = [Op("mm", 10, 1), Op("mm", 30, 1), Op("mul", 0, 4), Op("_foreach_add_", 0, 5)]
    cpu = measured(ops, [1.0, 1.0, 8.0, 5.0], rows=2)
    assert cpu == Measured({"mm": 0.05}, {"mul": 2.0, "optimizer": 1.0}, 2)
    assert cpu.seconds(Op("mm", 100, 1000)) == pytest.approx(5)
    assert cpu.seconds(Op("optimizer", 0, 7)) == pytest.approx(7)
    assert cpu.seconds(Op("never met", 0, 2)) == pytest.approx(3)


def published(name, precision):
    """A supervised step of a timm model without data, an image."""
    rows = 64
    with torch.device("meta"):
        model = timm.create_model(name)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        with Counter() as counter:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                out = model(torch.empty(rows, 3, 224, 224))
            out.float().sum().backward()
    return rows, counter.ops


def test_published_rates_of_resnets_are_met():
    """Images/s: RTX 3090, NCHW, AMP (timm's benchmark tables); A100, V100 (NVIDIA's README)."""
    volta = replace(GPUS["V100"], bf16_tflops=125)  # its fp16, which bf16 stands for here
    eighteen, fifty = published("resnet18", "bf16"), published("resnet50", "bf16")
    for gpu, (rows, ops), rate in (
        (GPUS["RTX3090"], eighteen, 2764),
        (GPUS["RTX3090"], fifty, 826),
        (GPUS["A100-80GB"], fifty, 2470),
        (GPUS["A100-80GB"], published("resnet50", "float32"), 938),
        (volta, fifty, 1200),
    ):
        found = rows / sum(Roofline(gpu).seconds(op) for op in ops)
        assert found == pytest.approx(rate, rel=0.12), gpu.name
