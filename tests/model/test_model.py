"""The model: gates, levels, pooled heads, and what public code of the method gets wrong."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from mlvicx_dist.config import LocalHead, Model, Projector
from mlvicx_dist.errors import CheckpointError, ConfigError
from mlvicx_dist.model.context import ContextBottleneck
from mlvicx_dist.model.encoder import Encoder, load_strictly
from mlvicx_dist.model.export_folder import load_export, save_export
from mlvicx_dist.model.heads import LocalHead as Head
from mlvicx_dist.model.heads import fold_matrix
from mlvicx_dist.model.mlvicx import build_model
from mlvicx_dist.objective.batch_norm import convert_batch_norm

SMALL = Model(local=LocalHead(resize_px=16, channels=8, pool=2), projector=Projector(width=16))
FAMILIES = [
    "resnet18",
    "resnet50",
    "efficientnet_b0",
    "convnext_atto",
    "mobilenetv3_small_100",
    "densenet121",
    "regnety_002",
    "vgg11_bn",
]


def plain_gate(gate, x):
    """The context bottleneck as DESIGN 4.1 says it."""

    def f(pool):
        return gate.excite(functional.relu(gate.squeeze(pool)))

    average = functional.adaptive_avg_pool2d(x, 1)
    maximum = functional.adaptive_max_pool2d(x, 1)
    y = x * torch.sigmoid(f(average) + f(maximum))
    pools = torch.stack([y.mean(1), y.amax(1)], 1)
    return y * torch.sigmoid(gate.spatial(pools))


def gated(gate, x, probe, form):
    """The map that comes out, and the gradient of its product with `probe` by all that went in."""
    x = x.detach().requires_grad_()
    out = form(x)
    gradients = torch.autograd.grad((out * probe).sum(), [x, *gate.parameters()])
    return [out.detach(), *gradients]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("rectified", [False, True])
def test_the_gate_is_the_papers_formula_in_value_and_gradient(layout, rectified):
    """Also where all channels of a place are zero, so that they share its maximum."""
    torch.manual_seed(0)
    gate = ContextBottleneck(6).double()
    x = torch.randn(3, 6, 9, 7, dtype=torch.float64)
    if rectified:
        x = x.relu()
        x[:, :, 2:5, 3] = 0
    x = x.contiguous(memory_format=layout)
    probe = torch.randn_like(x)
    assert not any(module.bias is not None for module in (gate.squeeze, gate.excite, gate.spatial))
    found = gated(gate, x, probe, gate)
    expected = gated(gate, x, probe, lambda x: plain_gate(gate, x))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-13, rtol=0)
    assert all(found[k].is_contiguous(memory_format=layout) for k in (0, 1))
    coarse = gated(gate.float(), x.float(), probe.float(), gate)
    for one, other in zip(coarse, expected, strict=True):
        assert torch.allclose(one.double(), other, atol=1e-4, rtol=0)


def test_a_gate_in_bf16_is_near_and_keeps_its_types():
    torch.manual_seed(0)
    gate = ContextBottleneck(16)
    x, probe = torch.randn(2, 2, 16, 12, 12)
    with torch.autocast("cpu", torch.bfloat16):
        found = gated(gate, x.bfloat16(), probe.bfloat16(), gate)
    expected = gated(gate, x, probe, gate)
    assert [z.dtype for z in found] == [torch.bfloat16] * 2 + [torch.float32] * 3
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < 0.05 * other.norm()


@pytest.mark.parametrize("sides", [(56, 56), (13, 7), (64, 64), (80, 3)])
def test_pooling_first_equals_resize_convolve_pool(sides):
    torch.manual_seed(0)
    head = Head(LocalHead(resize_px=16, channels=5, pool=4), [3], trained=True).double()
    x = torch.randn(2, 3, *sides, dtype=torch.float64, requires_grad=True)
    resized = functional.interpolate(x, (16, 16), mode="bilinear", align_corners=False)
    expected = functional.adaptive_avg_pool2d(head.convs[0](resized), 4).flatten(1)
    (found,) = head([x])
    assert torch.allclose(found, expected, atol=1e-13, rtol=0)
    probe = torch.randn_like(expected)
    (first,) = torch.autograd.grad((expected * probe).sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad((found * probe).sum(), x)
    assert torch.allclose(first, second, atol=1e-13, rtol=0)
    assert torch.allclose(fold_matrix(sides[0], 16, 4).sum(1), torch.ones(4).double())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_gated_at_its_own_levels_and_all_of_it_is_trained(name):
    model = build_model(SMALL.model_copy(update={"backbone": name}), 0)
    seen = []
    for gate in model.encoder.gates.values():
        gate.register_forward_hook(lambda module, inputs, output: seen.append(output))
    view = torch.rand(2, 1, 64, 64)
    maps = model.encoder(view)
    assert len(seen) == len(model.encoder.levels) == len(maps)
    assert all(m is g for m, g in zip(maps, seen, strict=True))
    (embeddings,) = model.project(maps)
    assert {k: list(v.shape) for k, v in embeddings.items()} == {
        "global": [2, 16],
        "local": [2, 16],
    }
    sum((v**2).sum() for v in embeddings.values()).backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None]
    assert idle == []


@pytest.mark.parametrize(
    ("name", "context"),
    [
        ("resnet18", True),
        ("mobilenetv3_small_100", True),
        ("densenet121", True),
        ("vgg11_bn", True),
        ("convnext_atto", True),
        ("dpn48b", False),
    ],
)
def test_recompute_changes_no_number_and_no_key(name, context):
    settings = SMALL.model_copy(update={"backbone": name, "context": context})
    views = torch.rand(2, 2, 1, 64, 64, dtype=torch.float64)
    results = []
    for recompute in (False, True):
        model = build_model(settings, 0).double()
        if recompute:
            model.encoder.recompute()
        outputs = [z for view in views for z in model(view).values()]
        loss = torch.stack([z.square().mean() for z in outputs]).sum()
        loss.backward()
        gradients = {f"grad {n}": p.grad for n, p in model.named_parameters()}
        results.append({"loss": loss.detach(), **gradients, **model.state_dict()})
    kept, recomputed = results
    assert kept.keys() == recomputed.keys()
    assert [k for k in kept if not torch.equal(kept[k], recomputed[k])] == []


def test_recompute_keeps_only_the_level_maps_for_backward():
    model = build_model(SMALL, 0)
    view = torch.rand(2, 1, 64, 64)
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), view]}

    def kept():
        storages = {}

        def pack(x):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            maps = model.encoder(view)
        levels = {m.untyped_storage().data_ptr() for m in maps}
        return levels, storages.keys() - own, maps

    levels, before, _ = kept()
    assert len(before) > 20
    model.encoder.recompute()
    levels, after, maps = kept()
    assert after <= levels
    sum(m.sum() for m in maps).backward()
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(maps, model.encoder(view), strict=True))


def test_a_backbone_that_is_no_chain_cannot_be_recomputed():
    model = build_model(
        SMALL.model_copy(update={"backbone": "legacy_xception", "context": False}), 0
    )
    with pytest.raises(ConfigError, match=r"legacy_xception is no chain.*train\.recompute=false"):
        model.encoder.recompute()


def test_the_next_stage_sees_the_gated_map():
    model = build_model(SMALL, 0).eval()
    view = torch.rand(1, 1, 64, 64)
    before = [m.clone() for m in model.encoder(view)]
    with torch.no_grad():
        model.encoder.gates["1"].spatial.weight.add_(1.0)
    after = model.encoder(view)
    changed = [not torch.allclose(a, b) for a, b in zip(before, after, strict=True)]
    assert changed == [False, True, True, True, True]


def test_per_level_and_no_levels():
    per_level = SMALL.model_copy(
        update={"levels": [3, 1], "local": LocalHead(fusion="per_level", resize_px=8, pool=2)}
    )
    view = torch.rand(2, 1, 64, 64)
    assert list(build_model(per_level, 0)(view)) == ["global", "level1", "level3"]
    assert list(build_model(SMALL.model_copy(update={"levels": []}), 0)(view)) == ["global"]


def test_frozen_level_convs_are_frozen():
    model = build_model(SMALL.model_copy(update={"level_convs": "frozen"}), 0)
    assert not any(p.requires_grad for p in model.local_head.parameters())
    assert all(p.requires_grad for p in model.global_projector.parameters())


def test_only_a_last_norm_that_was_asked_for():
    plain, normed = (
        build_model(SMALL.model_copy(update={"projector": Projector(width=8, last_norm=n)}), 0)
        for n in (False, True)
    )
    assert isinstance(plain.global_projector[-1], torch.nn.Linear)
    assert isinstance(normed.global_projector[-1], torch.nn.BatchNorm1d)


def test_the_seed_decides_the_weights_and_nothing_else_moves():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (build_model(SMALL, seed).state_dict() for seed in (1, 1, 2))
    assert torch.rand(1) == expected
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(
        first["encoder.backbone.conv1.weight"], other["encoder.backbone.conv1.weight"]
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backbone": "resnet81"}, "timm has no such model"),
        ({"backbone": "resnet18.a1_in1kk"}, "levels .*a1_in1kk"),
        ({"levels": [0, 7]}, "level 7, but resnet18 has the levels 0 to 4"),
        ({"backbone": "hrnet_w18_small"}, "hrnet"),
    ],
)
def test_a_model_that_cannot_be_is_one_sentence(change, words):
    with pytest.raises(ConfigError, match=words):
        model = build_model(SMALL.model_copy(update=change), 0)
        model.encoder(torch.rand(1, 1, 64, 64))


@pytest.fixture(scope="module")
def encoder():
    return Encoder.from_model(build_model(SMALL, 0), 64).eval()


def test_bytes_and_floats_one_channel_and_three_are_the_same_image(encoder):
    images = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8)
    embedding = encoder(images)
    assert embedding.shape == (2, 512)
    assert torch.allclose(encoder(images / 255), embedding)
    assert torch.allclose(encoder(images.expand(-1, 3, -1, -1)), embedding, atol=1e-5)
    rgb = Encoder.from_model(build_model(SMALL.model_copy(update={"channels": 3}), 0), 64).eval()
    assert torch.allclose(rgb(images), rgb(images.expand(-1, 3, -1, -1)), atol=1e-6)
    assert torch.equal(encoder.levels(images)[-1].mean((2, 3)), embedding)


def test_an_export_comes_back_the_same(encoder, tmp_path):
    save_export(encoder, tmp_path / "e", card="a card", known={})
    images = torch.rand(2, 1, 64, 64)
    assert torch.equal(load_export(tmp_path / "e").eval()(images), encoder(images))
    assert sorted(p.name for p in (tmp_path / "e").iterdir()) == [
        "README.md",
        "config.json",
        "encoder.safetensors",
    ]


def test_one_missing_or_extra_key_is_an_error(encoder):
    weights = encoder.state_dict()
    missing = {k: v for k, v in weights.items() if "gates.3.spatial" not in k}
    with pytest.raises(CheckpointError, match=r"gates\.3\.spatial\.weight is missing"):
        load_strictly(encoder, missing, where="x")
    with pytest.raises(CheckpointError, match="more is extra"):
        load_strictly(encoder, {**weights, "more": torch.zeros(1)}, where="x")


@pytest.mark.parametrize("backbone", ["resnet18", "densenet121", "mobilenetv3_small_100"])
def test_the_batch_norm_of_a_gpu_group_keeps_every_gate(backbone):
    model = build_model(Model(backbone=backbone, projector=Projector(width=8)), 0)
    keys = list(model.state_dict())
    gates = sum(len(module._forward_hooks) for module in model.modules())
    assert gates == len(model.encoder.levels)
    # What is made for CUDA needs none to be made.
    model = convert_batch_norm(model, torch.device("cuda"))
    assert sum(len(module._forward_hooks) for module in model.modules()) == gates
    assert any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    assert list(model.state_dict()) == keys
