"""What is counted against hand counts, PyTorch's own counter and what a real step does."""

from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from mlvicx_dist.config import Loss, Model, Train, parse_config
from mlvicx_dist.model.mlvicx import build_model
from mlvicx_dist.objective import baselines, batch_norm, global_batch, labels
from mlvicx_dist.objective.baselines import FROM_LIBRARY, baseline_loss
from mlvicx_dist.objective.batch_norm import convert_batch_norm
from mlvicx_dist.objective.global_batch import global_terms, weighted_loss
from mlvicx_dist.objective.labels import label_loss
from mlvicx_dist.objective.wide_linear import gather_rows, gathered_weights
from mlvicx_dist.plan.work import (
    FLOAT_BYTES,
    OPTIMIZER_PASSES,
    Counter,
    baseline_ops,
    count_work,
    exchange_of,
    loss_ops,
    photometric_ops,
)
from mlvicx_dist.stream.augment import PARAMETERS, photometrics
from mlvicx_dist.train.optim import make_optimizer
from mlvicx_dist.train.step import TwoViews, gathered_layers


@pytest.fixture
def gathered(monkeypatch):
    """The bytes of each gather of a group whose other workers send what this one does."""
    sizes = []

    def gather(parts, own, async_op=False):
        sizes.append(len(parts) * own.nbytes)
        for part in parts:
            part.copy_(own)
        return Mock()

    monkeypatch.setattr(dist, "all_gather", gather)
    return sizes


def test_a_resnet18_has_the_flops_of_a_count_by_hand():
    def convolution(kernel, inputs, outputs, side):
        return 2 * kernel**2 * inputs * outputs * side**2

    by_hand = convolution(7, 3, 64, 112) + 4 * convolution(3, 64, 64, 56)
    for inputs, side in ((64, 28), (128, 14), (256, 7)):
        by_hand += convolution(3, inputs, 2 * inputs, side) + convolution(
            1, inputs, 2 * inputs, side
        )
        by_hand += 3 * convolution(3, 2 * inputs, 2 * inputs, side)
    assert by_hand == 3_627_122_688
    encoder = build_model(Model(channels=3, context=False), 0).encoder.eval()
    with torch.no_grad(), Counter() as counter:
        encoder(torch.zeros(1, 3, 224, 224))
    assert sum(op.flops for op in counter.ops) == by_hand


def test_bytes_are_those_of_each_tensor_once_and_views_are_free():
    a, b = torch.zeros(10, 10), torch.zeros(10, 10)
    with Counter() as counter:
        a.add_(b)
        a.view(100).narrow(0, 0, 50)
        torch.empty_like(a)
        torch.mul(a, b, out=b)
        torch._foreach_add_([a, b], [b, a])
        a.bfloat16()
    assert [(op.name, op.moved_bytes) for op in counter.ops] == [
        ("add_", 1200),
        ("mul", 1200),
        ("_foreach_add_", 2400),
        ("_to_copy", 600),
    ]


@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_without_data_has_the_flops_of_a_real_one(config, recompute):
    settings = config(train__recompute=recompute, model__context=True)
    model = build_model(settings.model, 0)
    if recompute:
        model.encoder.recompute()
    with FlopCounterMode(display=False) as real:
        first, second, _ = TwoViews(model)(*torch.rand(2, 7, 1, 32, 32))
        outputs = [*first.values(), *second.values()]
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
    work = count_work(settings, 7)
    found = sum(op.flops for op in (*work.forward, *work.backward))
    assert found == real.get_total_flops()
    assert work.trained == sum(p.numel() for p in model.parameters())


def test_bf16_halves_what_the_maps_move(config):
    one, other = (
        sum(op.moved_bytes for op in (*work.forward, *work.backward))
        for work in (count_work(config(train__precision=p), 64) for p in ("float32", "bf16"))
    )
    assert 0.4 < other / one < 0.75


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZER_PASSES))
def test_an_optimizer_moves_as_many_bytes_as_are_assumed(optimizer):
    model = torch.nn.Linear(300, 300)
    made = make_optimizer(model, Train(optimizer=optimizer))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    made.step()
    with Counter() as counter:
        made.step()
    passes = sum(op.moved_bytes for op in counter.ops) / FLOAT_BYTES / (300 * 301)
    assert passes == pytest.approx(OPTIMIZER_PASSES[optimizer], rel=0.01)


def test_the_photometrics_compute_and_move_what_their_formula_says(config):
    settings = config(views__image_size_px=90, views__blur_p=[1.0, 1.0], views__blur_kernel_px=5)
    views = torch.zeros(2, 3, 1, 90, 90, dtype=torch.uint8)
    with Counter() as counter:
        for view in views:
            photometrics(view, torch.ones(3, len(PARAMETERS)), kernel_px=5)
    foretold = photometric_ops(settings, 3)
    assert sum(op.flops for op in foretold) == sum(op.flops for op in counter.ops)
    moved = sum(op.moved_bytes for op in counter.ops)
    assert sum(op.moved_bytes for op in foretold) == pytest.approx(moved, rel=0.1)


@pytest.mark.parametrize(("rows", "width"), [(48, 96), (192, 48)])
def test_the_terms_of_the_loss_compute_and_move_what_their_formula_says(rows, width):
    views = [
        {name: torch.randn(rows, width, requires_grad=True) for name in ("global", "local")}
        for _ in range(2)
    ]
    with Counter() as counter:
        terms, _ = global_terms(*views, shares=(rows,))
        weighted_loss(terms, Loss()).backward()
    foretold = loss_ops(rows, rows, [width] * 4)
    assert sum(op.flops for op in foretold) == sum(op.flops for op in counter.ops)
    moved = sum(op.moved_bytes for op in counter.ops)
    assert sum(op.moved_bytes for op in foretold) == pytest.approx(moved, rel=0.15)


@pytest.mark.parametrize("method", FROM_LIBRARY)
@pytest.mark.parametrize(("batch", "width"), [(48, 96), (192, 48)])
def test_a_baselines_loss_computes_and_moves_what_its_formula_says(method, batch, width):
    views = [
        {name: torch.randn(batch, width, requires_grad=True) for name in ("global", "prediction")}
        for _ in range(2)
    ]
    with Counter() as counter:
        loss, _ = baseline_loss(method, *views, Loss(), shares=[batch])
        loss.backward()
    foretold = baseline_ops(method, batch, width)
    assert sum(op.flops for op in foretold) == sum(op.flops for op in counter.ops)
    moved = sum(op.moved_bytes for op in counter.ops)
    assert sum(op.moved_bytes for op in foretold) == pytest.approx(moved, rel=0.15)


@pytest.mark.parametrize("method", FROM_LIBRARY)
def test_a_baseline_gathers_its_embeddings(config, monkeypatch, gathered, method):
    settings = config(train__batch_size=8).model_dump(by_alias=True)
    settings["model"] = {"backbone": "test_resnet", "projector": {"width": 16}}
    settings = parse_config(settings | {"method": method}, "test")
    for module in (global_batch, batch_norm):
        monkeypatch.setattr(module, "world_size", lambda: 2)
    monkeypatch.setattr(baselines, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "all_reduce", lambda x: None)
    model = convert_batch_norm(build_model(settings.model, 0), torch.device("cpu"))
    first, second, _ = TwoViews(model)(*torch.rand(2, 4, 1, 32, 32))
    norms = len(gathered)
    baseline_loss(method, first, second, settings.loss, shares=[4, 4])
    exchange = exchange_of(count_work(settings, 4), 8)
    assert exchange.gathers == len(gathered)
    assert exchange.gathered_bytes == sum(gathered[norms:])


def test_a_training_on_labels_exchanges_two_numbers(config, monkeypatch):
    settings = config(train__batch_size=8).model_dump(by_alias=True)
    settings["model"] = {"backbone": "test_resnet", "classes": ["a", "b"]}
    settings = parse_config(settings | {"method": "supervised"}, "test")
    exchange = exchange_of(count_work(settings, 4), 8)
    plain = exchange_of(count_work(config(train__batch_size=8), 4), 8)
    reduced = []
    monkeypatch.setattr(labels, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda x: reduced.append(x.nbytes))
    label_loss(torch.zeros(4, 2), torch.zeros(4, 2))
    assert reduced == [exchange.loss_bytes]
    assert exchange.reductions == count_work(settings, 4).times("native_batch_norm_backward") + 1
    assert exchange.gathered_bytes == 0 < plain.gathered_bytes


@pytest.mark.parametrize("width", [16, 4])
def test_a_group_exchanges_what_is_counted(config, monkeypatch, gathered, width):
    # A group of two whose other half sends nothing: what this half sends is written down.
    settings = config(model__projector={"width": width}, train__batch_size=8)
    work = count_work(settings, 4)
    reduced = []
    for module in (global_batch, batch_norm):
        monkeypatch.setattr(module, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda x: reduced.append(x.nbytes))
    model = convert_batch_norm(build_model(settings.model, 0), torch.device("cpu"))
    first, second, _ = TwoViews(model)(*torch.rand(2, 4, 1, 32, 32))
    at = len(gathered), len(reduced)
    terms, _ = global_terms(first, second, shares=(4, 4))
    ours = sum(gathered[at[0] :]), sum(reduced[at[1] :])
    weighted_loss(terms, settings.loss).backward()

    exchange = exchange_of(work, 8)
    assert exchange.gradient_bytes == 4 * sum(p.numel() for p in model.parameters())
    encoder = sum(p.numel() for p in model.encoder.parameters())
    assert exchange.early_bytes == exchange.gradient_bytes - 4 * encoder
    halved = config(model__projector={"width": width}, train__batch_size=8, train__gradients="bf16")
    assert 2 * exchange_of(count_work(halved, 4), 8).gradient_bytes == exchange.gradient_bytes
    assert (exchange.gathers, exchange.reductions) == (len(gathered), len(reduced))
    assert exchange.gathered_bytes == ours[0]
    # Beside them the terms themselves are summed, a few numbers.
    assert exchange.loss_bytes == pytest.approx(ours[1], abs=100)


def test_a_group_that_gathers_rows_exchanges_what_is_counted(config, gathered):
    changes = {"model__projector": {"width": 160}, "train__batch_size": 8}
    plain = count_work(config(**changes), 4)
    settings = config(**changes, train__gather_rows=True)
    work = count_work(settings, 4)
    module = TwoViews(build_model(settings.model, 0))
    gather_rows(gathered_layers(module.model, settings.train), [8, 8])
    embeddings = module(*torch.rand(2, 4, 1, 32, 32))[:2]
    sum(x.sum() for view in embeddings for x in view.values()).backward()
    exchange, reduced = exchange_of(work, 8), exchange_of(plain, 8)
    assert exchange.row_bytes == sum(gathered) > 0
    assert exchange.gathers - reduced.gathers == len(gathered)
    wide = sum(weight.numel() for weight in gathered_weights(module).values())
    assert reduced.gradient_bytes - exchange.gradient_bytes == 4 * wide
    assert reduced.early_bytes - exchange.early_bytes == 4 * wide
    # Of two workers each computes the product of its own rows and of as many more.
    assert work.flops - plain.flops == 2 * (2 * 4) * wide
