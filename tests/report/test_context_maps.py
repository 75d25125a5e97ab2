"""The pictures of what the context passes are those of its own spatial gates."""

import numpy as np
import pytest
import torch
from PIL import Image
from small import small_tree

from mlvicx_dist.config import Model
from mlvicx_dist.model.context import ContextBottleneck
from mlvicx_dist.model.encoder import Encoder
from mlvicx_dist.model.mlvicx import build_model
from mlvicx_dist.report.context_maps import context_maps, tinted


@pytest.fixture(scope="module")
def encoder():
    return Encoder.from_model(
        build_model(Model.model_validate(small_tree()["model"]), 0), 32
    ).eval()


def test_the_gate_that_is_looked_at_is_the_one_that_is_used():
    torch.manual_seed(0)
    gate = ContextBottleneck(6)
    x = torch.rand(2, 6, 5, 4) + 0.1
    passed = gate(x) / x
    # What is passed is a channel's share times a place's: the places alone are left of a ratio.
    shares = gate.places(x)
    assert torch.allclose(
        passed / passed[:, :, :1, :1], (shares / shares[:, :, :1, :1]).expand_as(x), rtol=1e-4
    )
    assert ((shares > 0) & (shares < 1)).all()


def test_every_gated_level_has_its_map_and_the_encoder_stays_as_it_was(encoder):
    images = torch.randint(0, 255, (3, 1, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        before = encoder(images)
        maps = encoder.levels(images)
    gates = encoder.context_maps(images)
    assert list(gates) == list(range(len(maps)))
    assert [gate.shape[2:] for gate in gates.values()] == [one.shape[2:] for one in maps]
    with torch.no_grad():
        assert torch.equal(encoder(images), before)
    assert not any(gate._forward_pre_hooks for gate in encoder.backbone.gates.values())


def test_a_picture_has_an_image_a_row_and_none_without_context(encoder, phantom_shards):
    picture = context_maps(encoder, [phantom_shards], "test", count=3)
    levels = len(encoder.backbone.gates)
    assert picture.size[0] / (levels + 1) == pytest.approx(167, abs=2)
    assert 3 * 160 < picture.size[1] < 3 * 180
    plain = encoder.settings.model_copy(update={"context": False})
    bare = Encoder.from_model(build_model(plain, 0), 32).eval()
    assert context_maps(bare, [phantom_shards], "test", count=3) is None


def test_the_most_passing_place_is_tinted_the_most():
    gate = np.zeros((4, 4), np.float32)
    gate[0, 0] = 1
    picture = np.asarray(tinted(Image.new("L", (40, 40), 100), gate)).astype(int)
    assert picture[2, 2, 0] > 150 and (picture[35, 35] == 100).all()
