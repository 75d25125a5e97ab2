"""What a group makes of a worker's step."""

import torch
import torch.distributed as dist
from processes import free_port, run_processes
from small import small_tree
from torch import nn

from mlvicx_dist.config import Model, Train
from mlvicx_dist.model.mlvicx import build_model
from mlvicx_dist.train.step import Member, TwoViews, wrap

WORKERS = 2


def gradients(rank, port, folder):
    """Leave the gradients of a linear layer, as a group sums them in each precision."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORKERS
    )
    images = torch.randn(3, 64, generator=torch.Generator().manual_seed(rank))
    found = {}
    for precision in ("float32", "bf16"):
        layer = nn.Linear(64, 5)
        wrapped = wrap(
            layer, Member(rank, WORKERS, torch.device("cpu")), Train(gradients=precision)
        )
        wrapped(images).sum().backward()
        found[precision] = layer.weight.grad.clone()
    torch.save((images.mean(0) * 3, found), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_gradients_are_exchanged_in_the_precision_that_was_asked_for(tmp_path):
    run_processes(gradients, (free_port(), tmp_path), WORKERS)
    left = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORKERS)]
    sums, found = zip(*left, strict=True)
    mean = (sum(sums) / WORKERS).expand(5, -1)
    for precision, rounding in (("float32", 1e-6), ("bf16", 2**-7)):
        ours, theirs = (one[precision] for one in found)
        assert torch.equal(ours, theirs) and ours.dtype == torch.float32
        assert float((ours - mean).abs().max()) < rounding * float(mean.abs().max())
        assert torch.equal(ours, ours.bfloat16().float()) == (precision == "bf16")


def test_a_worker_alone_exchanges_nothing():
    layer = nn.Linear(2, 2)
    assert wrap(layer, Member(0, 1, torch.device("cpu")), Train(gradients="bf16")) is layer


def test_the_gradients_behind_the_encoder_are_whole_before_its_own():
    """So that a group exchanges them, nine tenths of the default's bytes, beside the backward."""
    model = build_model(Model(**small_tree()["model"]), 0)
    ready = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _, name=name: ready.append(name.startswith("encoder."))
        )
    first, second, _ = TwoViews(model)(*torch.rand(2, 3, 1, 64, 64))
    sum(z.square().mean() for z in (*first.values(), *second.values())).backward()
    assert len(ready) == len(list(model.parameters()))
    assert ready == sorted(ready)
