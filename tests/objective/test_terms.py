"""The terms in float64 against their plain forms."""

import pytest
import torch

from mlvicx_dist.objective.terms import vic_terms


def plain(a, b):
    """The terms as the papers write them, with the D x D covariance."""

    def hinge(z):
        return torch.relu(1 - torch.sqrt(z.var(0) + 1e-4)).mean()

    def penalty(z):
        c = torch.cov(z.T)
        return (c - torch.diag(c.diag())).square().sum() / z.shape[1]

    return ((a - b) ** 2).mean(), (hinge(a) + hinge(b)) / 2, penalty(a) + penalty(b)


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (9, 9)])
def test_both_forms_equal_the_plain_one_in_value_and_gradient(shape):
    generator = torch.Generator().manual_seed(0)
    a, b = (
        (0.7 * torch.randn(shape, generator=generator, dtype=torch.float64) + 3).requires_grad_()
        for _ in range(2)
    )
    for found, expected in zip(vic_terms(a, b), plain(a, b), strict=True):
        assert found.item() == pytest.approx(expected.item(), rel=1e-12)
        ours = torch.autograd.grad(found, (a, b), retain_graph=True)
        theirs = torch.autograd.grad(expected, (a, b), retain_graph=True)
        for x, y in zip(ours, theirs, strict=True):
            assert (x - y).abs().max() <= 1e-12 * y.abs().max()


def test_gradients_are_those_of_finite_differences():
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.rand(5, 4, generator=generator).double().requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda x, y: tuple(vic_terms(x, y)), (a, b))


def test_autocast_leaves_float32_alone():
    a, b = torch.randn(64, 32), torch.randn(64, 32)
    expected = vic_terms(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        found = vic_terms(a, b)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert all(x.dtype == torch.float32 for x in vic_terms(a.bfloat16(), b.bfloat16()))


def test_one_row_has_no_variance():
    with pytest.raises(ValueError, match="N >= 2"):
        vic_terms(torch.zeros(1, 4), torch.zeros(1, 4))
