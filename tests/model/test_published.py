"""Ours and the published form written out plainly have the same loss and the same gradients."""

import pytest
import torch
from published import Published, published_loss

from mlvicx_dist.config import LocalHead, Loss, Model, Projector
from mlvicx_dist.model.mlvicx import build_model
from mlvicx_dist.objective.global_batch import global_terms, weighted_loss
from mlvicx_dist.train.step import TwoViews

WIDTH = 32


def test_loss_and_gradients_are_those_of_the_published_form():
    settings = Model(
        backbone="resnet18",
        channels=3,
        local=LocalHead(resize_px=64, channels=512, pool=4),
        projector=Projector(width=WIDTH, last_norm=True),
    )
    ours = build_model(settings, 0).double()
    theirs = Published("resnet18", WIDTH).double()
    theirs.load_state_dict(ours.state_dict())
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 3, 3, 32, 32, generator=generator, dtype=torch.float64)

    embeddings1, embeddings2, _ = TwoViews(ours)(first, second)
    terms, _ = global_terms(embeddings1, embeddings2)
    loss = weighted_loss(terms, Loss())
    loss.backward()
    expected = published_loss(theirs, first, second)
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    # The gradient of a bias before a batch norm is zero: what is there is rounding of the others.
    rounding = 1e-15 * max(gradient.norm() for gradient in gradients.values())
    for name, parameter in ours.named_parameters():
        difference = (parameter.grad - gradients[name]).norm()
        assert difference <= 1e-9 * gradients[name].norm() + rounding, name
    for name, buffer in theirs.named_buffers():
        assert torch.allclose(ours.get_buffer(name), buffer, rtol=1e-12, atol=1e-12), name
