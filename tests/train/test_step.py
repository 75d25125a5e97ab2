"""What a group makes of a worker's step."""

import torch
import torch.distributed as dist
from processes import free_port, run_processes
from small import small_tree
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from mlvicx_dist.config import Model, Train
from mlvicx_dist.model.mlvicx import build_model
from mlvicx_dist.objective.wide_linear import gathered_weights
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


def left_out(rank, port, folder):
    """Leave which gradients DDP is not to reduce, those that it reduces, and the weights."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORKERS
    )
    tree = small_tree()["model"] | {"projector": {"width": 160}}
    model = build_model(Model(**tree), rank)
    member = Member(rank, WORKERS, torch.device("cpu"))
    wrapped = wrap(TwoViews(model), member, Train(batch_size=6, gather_rows=True))
    reduced = []

    def watched(_, bucket):
        reduced.append(bucket.buffer().numel())
        return bf16_compress_hook(None, bucket)

    wrapped.register_comm_hook(None, watched)
    first, second, _ = wrapped(*torch.rand(2, 3, 1, 32, 32))
    sum(x.square().sum() for view in (first, second) for x in view.values()).backward()
    weights = {name: weight.detach() for name, weight in gathered_weights(model).items()}
    gradients = {name: weight.grad for name, weight in gathered_weights(model).items()}
    every = sum(p.numel() for p in model.parameters())
    torch.save(
        (wrapped.parameters_to_ignore, sum(reduced), every, weights, gradients),
        folder / f"{rank}.pt",
    )
    dist.destroy_process_group()


def test_weights_whose_rows_are_gathered_are_left_out_of_the_all_reduce(tmp_path):
    run_processes(left_out, (free_port(), tmp_path), WORKERS)
    (names, reduced, every, weights, gradients), other = (
        torch.load(tmp_path / f"{rank}.pt") for rank in range(WORKERS)
    )
    assert len(weights) == 5
    assert set(names) == {f"model.{name}" for name in weights}
    assert reduced == every - sum(weight.numel() for weight in weights.values())
    # They began with other weights, and have each other's rows.
    for name in weights:
        assert torch.equal(weights[name], other[3][name])
        assert torch.equal(gradients[name], other[4][name])


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
