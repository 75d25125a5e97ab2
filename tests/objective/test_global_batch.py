"""The loss of the global batch: W processes equal one (DESIGN 3.4)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import free_port, run_processes
from torch import nn

from mlvicx_dist.config import LocalHead, Loss, Model, Projector, Train
from mlvicx_dist.model.mlvicx import build_model
from mlvicx_dist.objective.batch_norm import convert_batch_norm
from mlvicx_dist.objective.global_batch import (
    ddp_scale,
    global_terms,
    weighted_loss,
)
from mlvicx_dist.objective.terms import vic_terms
from mlvicx_dist.objective.wide_linear import gather_rows, gathered_weights
from mlvicx_dist.train.step import Member, TwoViews, gathered_layers, wrap

STEPS = 10
SHARES = {1: [7], 2: [5, 2], 3: [3, 1, 3]}
WIDTHS = {"rows": 12, "columns": 5}
"""N < D, where rows are gathered, and N >= D, where D x D products are reduced."""
WIDE = 160
"""At which the 14 rows of both views are less than the weights of five layers."""


def model_of(width: int) -> Model:
    return Model(
        backbone="test_resnet",
        local=LocalHead(resize_px=8, channels=4, pool=2),
        projector=Projector(width=width),
    )


@dataclass(frozen=True)
class Case:
    """What a run does beside its width and the size of its group."""

    dtype: torch.dtype = torch.float64
    recompute: bool = False
    steps: int = STEPS
    gather_rows: bool = False
    bf16: bool = False
    times: int = 1
    """How many times as large the batch is; batch norm of seven images makes rounding large."""


EXACT, SINGLE = Case(), Case(dtype=torch.float32, steps=1, times=4)


def train(
    width: int, world_size: int, rank: int, case: Case = EXACT
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Some steps; the losses, and the weights and first gradients of the model."""
    torch.set_num_threads(1)
    model = build_model(model_of(width), 0).to(case.dtype)
    # In float64 against PyTorch's own batch norm; in float32 as a worker does.
    if world_size > 1 or case.dtype == torch.float32:
        convert_batch_norm(model, torch.device("cpu"))
    if case.recompute:
        model.encoder.recompute()
    module = TwoViews(model)
    shares = [case.times * share for share in SHARES[world_size]]
    if world_size > 1:
        settings = Train(gather_rows=case.gather_rows, batch_size=sum(shares))
        module = wrap(module, Member(rank, world_size, torch.device("cpu")), settings)
        assert bool(gathered_weights(model)) == case.gather_rows
        # A run's shares are as equal as can be, these are not.
        gather_rows(gathered_layers(model, settings), [2 * share for share in shares])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    start = sum(shares[:rank])
    losses, found = [], {}
    for step in range(case.steps):
        views = torch.randn(2, sum(shares), 1, 32, 32, generator=generator, dtype=torch.float64)
        mine = views[:, start : start + shares[rank]].to(case.dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=case.bf16):
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


def worker(rank: int, width: int, world_size: int, port: int, path: str, case: Case) -> None:
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size
    )
    result = train(width, world_size, rank, case)
    if rank == world_size - 1:
        torch.save(result, path)
    dist.destroy_process_group()


def train_many(width: int, world_size: int, folder: Path, case: Case = EXACT):
    """`train` on as many processes; the last rank's answer."""
    path = str(folder / "result.pt")
    run_processes(worker, (width, world_size, free_port(), path, case), world_size)
    return torch.load(path)


def largest(tensors: Mapping[str, torch.Tensor], names: Sequence[str]) -> float:
    return max(tensors[name].abs().max().item() for name in names)


def apart(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], names) -> float:
    return largest({name: one[name] - other[name] for name in names}, names)


def assert_equal_runs(found, expected) -> None:
    """Ten float64 steps agree: loss and gradients of the first to 1e-12, the rest to 1e-9."""
    assert found[0][0] == pytest.approx(expected[0][0], rel=1e-12)
    assert found[0] == pytest.approx(expected[0], rel=1e-9)
    assert found[1].keys() == expected[1].keys()
    gradients = [name for name in expected[1] if name.startswith("grad")]
    state = [name for name in expected[1] if not name.startswith("grad")]
    for names, tolerance in ((gradients, 1e-12), (state, 1e-9)):
        assert apart(found[1], expected[1], names) <= tolerance * largest(expected[1], names)


@pytest.fixture(scope="module")
def alone():
    return {form: train(width, 1, 0) for form, width in WIDTHS.items()}


@pytest.mark.parametrize("form", list(WIDTHS))
@pytest.mark.parametrize("world_size", [2, 3])
def test_many_processes_with_unequal_shares_equal_one(alone, world_size, form, tmp_path):
    assert_equal_runs(train_many(WIDTHS[form], world_size, tmp_path), alone[form])


@pytest.mark.parametrize("world_size", [2, 3])
def test_gathered_rows_give_the_gradients_of_one_process(world_size, tmp_path):
    found = train_many(WIDE, world_size, tmp_path, Case(gather_rows=True))
    assert_equal_runs(found, train(WIDE, 1, 0))


@pytest.mark.parametrize("world_size", [1, 2])
def test_recomputed_stages_equal_kept_ones_on_one_process_and_on_two(alone, world_size, tmp_path):
    case = Case(recompute=True)
    width = WIDTHS["rows"]
    if world_size == 1:
        found = train(width, 1, 0, case)
    else:
        found = train_many(width, world_size, tmp_path, case)
    assert_equal_runs(found, alone["rows"])
    moved = {k: v for k, v in alone["rows"][1].items() if k.endswith("num_batches_tracked")}
    assert moved and all(found[1][name] == count == 2 * STEPS for name, count in moved.items())


@pytest.mark.parametrize("world_size", [2, 3])
def test_in_float32_the_first_step_is_that_of_one_process_to_1e_5(world_size, tmp_path):
    (expected_loss,), expected = train(4 * WIDTHS["rows"], 1, 0, SINGLE)
    (loss,), found = train_many(4 * WIDTHS["rows"], world_size, tmp_path, SINGLE)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    gradients = [name for name in expected if name.startswith("grad")]
    assert apart(found, expected, gradients) <= 1e-5 * largest(expected, gradients)


def test_in_bf16_gathered_rows_give_the_gradients_of_an_all_reduce(tmp_path):
    case = Case(dtype=torch.float32, steps=1, times=2, bf16=True)
    (expected_loss,), expected = train_many(2 * WIDE, 2, tmp_path, case)
    (loss,), found = train_many(2 * WIDE, 2, tmp_path, replace(case, gather_rows=True))
    assert loss == expected_loss
    gathered = [name for name in expected if re.match(r"grad .*projector.*[36]\.weight", name)]
    assert len(gathered) == 4
    # The sum is rounded, where an all-reduce sums what is.
    for name in gathered:
        assert apart(found, expected, [name]) <= 2**-7 * largest(expected, [name])
        assert not torch.equal(found[name], expected[name])


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


# PyTorch's own adds up one number after the other there: 1e-5 and more at this size.
@pytest.mark.parametrize(("dtype", "apart"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)])
def test_batch_norm_is_as_exact_in_channels_last_as_in_the_other_layout(dtype, apart):
    generator = torch.Generator().manual_seed(0)
    x, dy = 1 + 2 * torch.randn(2, 8, 16, 112, 112, generator=generator, dtype=torch.float64)
    truth = nn.BatchNorm2d(16).double()
    norm = convert_batch_norm(nn.Sequential(nn.BatchNorm2d(16)), torch.device("cpu"))
    found = []
    for module, kind in ((truth, torch.float64), (norm, dtype)):
        # What the type cannot hold is no error of the norm.
        leaf, gradient = (z.to(dtype).to(kind) for z in (x, dy))
        leaf = leaf.contiguous(memory_format=torch.channels_last).requires_grad_()
        y = module(leaf)
        y.backward(gradient)
        found.append((y, leaf.grad))
    for expected, ours in zip(*found, strict=True):
        assert ours.dtype == dtype
        assert (ours - expected).norm() < apart * expected.norm()
