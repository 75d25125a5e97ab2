"""The weights under timm's names: the same function, or no file."""

import pytest
import timm
import torch
from safetensors.torch import load_file

from mlvicx_dist.export.command import export
from mlvicx_dist.model.encoder import NORMALISATION
from mlvicx_dist.train.weights import load_encoder


@pytest.mark.parametrize(
    ("backbone", "channels"),
    [
        ("test_resnet", 1),
        ("test_resnet", 3),
        # timm joins parts of its names.
        pytest.param("densenet121", 1, marks=pytest.mark.slow),
    ],
)
def test_timms_plain_model_gives_the_same_embeddings(make_run, tmp_path, backbone, channels):
    run = make_run(tmp_path / "r", backbone=backbone, channels=channels, context=False)
    folder = export(run, tmp_path / "e").folder
    model = timm.create_model(backbone, in_chans=channels, num_classes=0).eval()
    model.load_state_dict(load_file(folder / "timm.safetensors"), strict=True)
    images = torch.randint(0, 256, (3, channels, 48, 48), dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in NORMALISATION[channels])
    with torch.inference_mode():
        expected = load_encoder(folder)(images)
        assert torch.allclose(model((images / 255 - mean) / std), expected, rtol=1e-4, atol=1e-5)
    assert f"`timm.create_model('{backbone}', in_chans={channels}, num_classes=0)`" in (
        (folder / "README.md").read_text()
    )


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ({}, "has none of the context gates"),
        ({"backbone": "test_convnext", "context": False}, "not pretrained (head.norm.bias"),
        ({"backbone": "test_efficientnet", "context": False}, "that were not pretrained ("),
    ],
)
def test_where_timms_is_another_function_there_is_no_file(make_run, tmp_path, model, why):
    done = export(make_run(tmp_path / "r", **model), tmp_path / "e")
    assert not (done.folder / "timm.safetensors").exists()
    assert why in " ".join(done.words)
    assert why in (done.folder / "README.md").read_text()
