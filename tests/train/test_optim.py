"""LARS against its plain form, and the schedule as a function of the step."""

import itertools

import pytest
import torch
from torch import nn

from mlvicx_dist.config import Train
from mlvicx_dist.train.optim import Lars, learning_rate, make_optimizer


def plain_step(params, buffers, *, lr, weight_decay):
    """DESIGN 4.1, one parameter after the other."""
    for p, m in zip(params, buffers, strict=True):
        d = p.grad.clone()
        if p.ndim > 1:
            d = d + weight_decay * p
            if p.norm() > 0 and d.norm() > 0:
                d = d * 0.001 * p.norm() / d.norm()
        m.mul_(0.9).add_(d)
        p.data.add_(m, alpha=-lr)


def test_lars_is_the_published_form():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)).double()
    nn.init.zeros_(model[2].weight)
    twin = [p.detach().clone() for p in model.parameters()]
    buffers = [torch.zeros_like(p) for p in twin]
    settings = Train(weight_decay=1e-3)
    optimizer = make_optimizer(model, settings)
    assert isinstance(optimizer, Lars)
    for step in range(12):
        for p, q in zip(model.parameters(), twin, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (step + 1)
        optimizer.step()
        plain_step(twin, buffers, lr=0.1 * (step + 1), weight_decay=1e-3)
    for p, q in zip(model.parameters(), twin, strict=True):
        assert (p - q).abs().max() <= 1e-14


def test_frozen_parameters_are_left_out():
    model = nn.Linear(3, 3)
    model.weight.requires_grad_(False)
    optimizer = make_optimizer(model, Train(optimizer="adamw"))
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 1]


def test_the_state_goes_through_a_weights_only_file(tmp_path):
    model = nn.Linear(3, 3)
    optimizer = make_optimizer(model, Train())
    model(torch.rand(2, 3)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    other = make_optimizer(model, Train())
    other.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
    first, second = (o.state[model.weight]["momentum"] for o in (optimizer, other))
    assert torch.equal(first, second)


def test_the_released_schedule_ends_where_it_did():
    settings = Train(batch_size=64, epochs=300, warmup_epochs=2, cosine_over="all_steps")

    def rate(step):
        return learning_rate(step, settings=settings, steps_per_epoch=100)

    peak = 0.2 * 64 / 256
    assert rate(0) == 0
    assert rate(100) == pytest.approx(peak / 2)
    assert rate(200) == pytest.approx(peak)
    assert rate(29_999) / peak == pytest.approx(0.00111, abs=5e-6)


def test_the_default_schedule_ends_at_a_thousandth():
    settings = Train(epochs=10, warmup_epochs=1)
    rates = [learning_rate(s, settings=settings, steps_per_epoch=50) for s in range(500)]
    assert max(rates) == rates[50] == pytest.approx(0.2)
    assert rates[-1] == pytest.approx(0.0002, rel=0.02)
    assert all(a > b for a, b in itertools.pairwise(rates[50:]))
