"""Wide linear layers whose rows are gathered; groups of processes are in test_global_batch."""

import pytest
import torch
import torch.distributed as dist
from processes import free_port, run_processes
from torch import nn

from mlvicx_dist.config import Projector
from mlvicx_dist.model.heads import projector
from mlvicx_dist.objective.wide_linear import align, gather_rows, gathered_weights, wide_layers


def test_a_layer_is_wide_where_its_rows_are_a_quarter_of_its_weights():
    layer = nn.Linear(64, 64)
    assert list(wide_layers(layer, 8)) == [layer]
    assert list(wide_layers(layer, 9)) == []


def test_at_the_defaults_width_and_batch_all_but_the_first_layer_are_wide():
    layers = projector(Projector(), 512)
    rows = 2 * 256
    assert [layer.in_features for layer in wide_layers(layers, rows)] == [4096, 4096]


@pytest.mark.parametrize("autocast", [False, True])
def test_of_one_process_the_numbers_are_those_of_a_plain_layer(autocast):
    torch.manual_seed(0)
    found = []
    for gathered in (False, True):
        layers = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 48))
        layers.load_state_dict(found[0][0] if found else layers.state_dict())
        weights = layers.state_dict()
        if gathered:
            gather_rows(wide_layers(layers, 4), [4])
            assert list(gathered_weights(layers)) == ["0.weight", "2.weight"]
            assert list(layers.state_dict()) == list(weights)
        x = torch.linspace(-1, 1, 4 * 48).reshape(4, 48).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layers(x)
        y.float().square().sum().backward()
        gradients = [x.grad, *(p.grad for p in layers.parameters())]
        found.append((weights, y.detach(), gradients))
    (_, plain_y, plain), (_, y, gradients) = found
    assert y.dtype == plain_y.dtype
    assert torch.equal(y, plain_y)
    for one, other in zip(gradients, plain, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def aligned(rank: int, port: int, path: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    layers = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 1)])
    gather_rows(wide_layers(layers, 8), [4, 4])
    for parameter in layers.parameters():
        nn.init.constant_(parameter, float(rank))
    align(layers)
    if rank == 1:
        torch.save(layers.state_dict(), path)
    dist.destroy_process_group()


def test_weights_whose_rows_are_gathered_are_made_those_of_rank_0(tmp_path):
    run_processes(aligned, (free_port(), str(tmp_path / "found.pt")), 2)
    found = torch.load(tmp_path / "found.pt")
    assert found["0.weight"].eq(0).all()
    # DDP sees to the others.
    assert found["0.bias"].eq(1).all() and found["1.weight"].eq(1).all()
