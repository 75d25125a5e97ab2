"""The loss of the global batch: W processes equal one (DESIGN 3.4)."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mlvicx_dist.config import LocalHead, Loss, Model, Projector
from mlvicx_dist.model.mlvicx import build_model
from mlvicx_dist.objective.global_batch import (
    convert_batch_norm,
    ddp_scale,
    global_terms,
    weighted_loss,
)
from mlvicx_dist.objective.terms import vic_terms
from mlvicx_dist.train.loop import TwoViews

BATCH, STEPS = 7, 10
SHARES = {1: [7], 2: [5, 2], 3: [3, 1, 3]}
WIDTHS = {"rows": 12, "columns": 5}
"""N < D, where rows are gathered, and N >= D, where D x D products are reduced."""


def settings(width: int) -> Model:
    return Model(
        backbone="test_resnet",
        local=LocalHead(resize_px=8, channels=4, pool=2),
        projector=Projector(width=width),
    )


def train(width: int, world_size: int, rank: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Ten steps in float64; the losses, and the weights and first gradients of the model."""
    torch.set_num_threads(1)
    model = build_model(settings(width), 0).double()
    if world_size > 1:
        convert_batch_norm(model, torch.device("cpu"))
    module: nn.Module = TwoViews(model)
    if world_size > 1:
        module = DistributedDataParallel(module, forward_sync_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    shares = SHARES[world_size]
    start = sum(shares[:rank])
    losses, found = [], {}
    for step in range(STEPS):
        views = torch.randn(2, BATCH, 1, 32, 32, generator=generator, dtype=torch.float64)
        mine = views[:, start : start + shares[rank]]
        first, second, _ = module(mine[0], mine[1])
        terms, _ = global_terms(first, second, shares=shares)
        loss = weighted_loss(terms, Loss())
        optimizer.zero_grad()
        (loss * ddp_scale()).backward()
        if step == 0:
            found = {f"grad {n}": p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
        losses.append(loss.item())
    return losses, found | {k: v.clone() for k, v in model.state_dict().items()}


def worker(rank: int, width: int, world_size: int, port: int, path: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size
    )
    result = train(width, world_size, rank)
    if rank == world_size - 1:
        torch.save(result, path)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone():
    return {form: train(width, 1, 0) for form, width in WIDTHS.items()}


@pytest.mark.parametrize("form", list(WIDTHS))
@pytest.mark.parametrize("world_size", [2, 3])
def test_many_processes_with_unequal_shares_equal_one(alone, world_size, form, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = str(tmp_path / "result.pt")
    mp.spawn(worker, (WIDTHS[form], world_size, port, path), nprocs=world_size)
    losses, found = torch.load(path)
    expected_losses, expected = alone[form]
    assert losses[0] == pytest.approx(expected_losses[0], rel=1e-12)
    assert losses == pytest.approx(expected_losses, rel=1e-9)
    assert found.keys() == expected.keys()
    gradients = [name for name in expected if name.startswith("grad")]
    state = [name for name in expected if not name.startswith("grad")]
    for names, tolerance in ((gradients, 1e-12), (state, 1e-9)):
        largest = max(expected[name].abs().max() for name in names)
        apart = max((found[name] - expected[name]).abs().max() for name in names)
        assert apart <= tolerance * largest


@pytest.mark.parametrize(("count", "width"), [(9, 14), (9, 9), (30, 4), (2, 3)])
def test_terms_and_gradients_are_those_of_the_plain_form(count, width):
    generator = torch.Generator().manual_seed(count)

    def pair():
        return [
            torch.randn(count, width, generator=generator, dtype=torch.float64).requires_grad_()
            for _ in range(2)
        ]

    views = {"global": pair(), "local": pair()}
    terms, spreads = global_terms(
        {name: 0.6 * a for name, (a, _) in views.items()},
        {name: 1.4 * b + 1 for name, (_, b) in views.items()},
    )
    weights = torch.rand(6, generator=generator, dtype=torch.float64)
    found = [x for name in views for x in terms[name]]
    (torch.stack(found) * weights).sum().backward()
    gradients = [x.grad.clone() for pair in views.values() for x in pair]
    for pair in views.values():
        for x in pair:
            x.grad = None
    plain = [x for a, b in views.values() for x in vic_terms(0.6 * a, 1.4 * b + 1)]
    (torch.stack(plain) * weights).sum().backward()
    expected = [x.grad for pair in views.values() for x in pair]
    assert torch.allclose(torch.stack(found), torch.stack(plain), rtol=1e-12, atol=0)
    scale = max(x.abs().max() for x in expected)
    assert (
        max((a - b).abs().max() for a, b in zip(gradients, expected, strict=True)) < 1e-12 * scale
    )
    deviation = (0.6 * views["local"][0]).std(0).mean()
    assert spreads["local"].item() == pytest.approx(deviation.item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_terms_are_at_least_float32(dtype):
    a, b = torch.randn(2, 8, 16).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        terms, _ = global_terms({"global": a}, {"global": b})
    expected = vic_terms(a.double(), b.double())
    for found, exact in zip(terms["global"], expected, strict=True):
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(exact.item(), rel=1e-5)


def test_lambda_weighs_the_mean_of_the_local_terms():
    embeddings = {
        name: torch.randn(8, 6, dtype=torch.float64) for name in ("global", "level1", "level3")
    }
    other = {name: torch.randn(8, 6, dtype=torch.float64) for name in embeddings}
    terms, _ = global_terms(embeddings, other)
    vic = {n: 25 * t.invariance + 25 * t.variance + t.covariance for n, t in terms.items()}
    expected = vic["global"] + 0.5 * (vic["level1"] + vic["level3"]) / 2
    found = weighted_loss(terms, Loss(lambda_local=0.5))
    assert found.item() == pytest.approx(expected.item(), rel=1e-14)
