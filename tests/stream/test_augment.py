"""The two views: keyed, bounded, and equal to their plain forms."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from mlvicx_dist.config import Views
from mlvicx_dist.stream.augment import blur, crop_box, photometric_row, photometrics, two_views

VIEWS = Views(image_size_px=32, blur_kernel_px=9)


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (70, 50), dtype=np.uint8)


def test_the_same_key_gives_the_same_views(image):
    first = two_views(image, VIEWS, seed=1, epoch=2, sample=3)
    again = two_views(image, VIEWS, seed=1, epoch=2, sample=3)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("change", [{"seed": 9}, {"epoch": 9}, {"sample": 9}])
def test_another_key_gives_other_views(image, change):
    key = {"seed": 1, "epoch": 2, "sample": 3}
    first, _ = two_views(image, VIEWS, **key)
    other, _ = two_views(image, VIEWS, **{**key, **change})
    assert not np.array_equal(first, other)
    assert not np.array_equal(first[0], first[1])


def test_crops_stay_inside_and_fill_their_range():
    rng = np.random.default_rng(1)
    areas, ratios = [], []
    for _ in range(2000):
        left, top, right, bottom = crop_box(200, 160, VIEWS, rng.random(40))
        assert 0 <= left < right <= 160
        assert 0 <= top < bottom <= 200
        areas.append((right - left) * (bottom - top) / 32000)
        ratios.append((right - left) / (bottom - top))
    assert 0.19 < min(areas) < 0.25
    assert max(areas) > 0.9
    assert 0.72 < min(ratios) < 0.8
    assert 1.25 < max(ratios) < 1.37


def test_an_image_that_no_crop_fits_is_cropped_in_the_middle():
    box = crop_box(10, 1000, Views(crop_scale=(0.9, 1.0)), np.full(40, 0.5))
    assert box == (493, 0, 506, 10)


def test_a_whole_image_view_is_torchvisions_resize(image):
    views = Views(
        image_size_px=32,
        blur_kernel_px=9,
        crop_scale=(1, 1),
        crop_ratio=(50 / 70, 50 / 70),
        flip_p=0,
    )
    crops, _ = two_views(image, views, seed=0, epoch=0, sample=0)
    expected = tv.resize(torch.from_numpy(image)[None], [32, 32], v2.InterpolationMode.BICUBIC)
    difference = crops[0].astype(int) - expected.numpy().astype(int)
    # The two round to bytes between the passes in their own ways.
    assert np.abs(difference).max() <= 2


def test_probabilities_are_kept():
    rng = np.random.default_rng(2)
    views = Views(jitter_p=0.8, blur_p=(1.0, 0.1), solarise_p=(0.0, 0.2))
    rows = np.array(
        [[photometric_row(views, v, rng.random(7)) for v in (0, 1)] for _ in range(4000)]
    )
    jittered = (rows[:, :, 0] != 1).mean()
    assert abs(jittered - 0.8) < 0.03
    assert (rows[:, 0, 4] > 0).all()
    assert abs((rows[:, 1, 4] > 0).mean() - 0.1) < 0.02
    assert not rows[:, 0, 5].any()
    assert abs(rows[:, 1, 5].mean() - 0.2) < 0.03
    assert abs((rows[:, :, 1] == 1).mean() - 0.5) < 0.03
    assert 0.6 <= rows[:, :, [0, 2]].min()
    assert rows[:, :, [0, 2]].max() <= 1.4


@pytest.mark.parametrize("size", [32, 75])
def test_photometrics_equal_torchvisions_one_image_at_a_time(size):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(6, 1, size, size, generator=generator, dtype=torch.float64)
    table = torch.tensor(
        [
            [1.3, 0, 0.7, 1, 0.0, 0],
            [0.7, 1, 1.3, 0, 1.5, 0],
            [1, 0, 1, 1, 0.0, 1],
            [1, 0, 1, 1, 0.4, 0],
            [1.2, 1, 0.9, 0, 2.0, 1],
            [1, 0, 1, 1, 0, 0],
        ],
        dtype=torch.float64,
    )
    ours = photometrics(x, table, kernel_px=9)
    for image, row, ours_image in zip(x, table.tolist(), ours, strict=True):
        plain = image
        for factor, contrast in ((row[0], row[1]), (row[2], row[3])):
            adjust = tv.adjust_contrast if contrast else tv.adjust_brightness
            plain = adjust(plain, factor)
        if row[4]:
            plain = tv.gaussian_blur(plain, [9, 9], [row[4], row[4]])
        if row[5]:
            plain = torch.where(plain >= 128 / 255, 1 - plain, plain)
        assert torch.allclose(ours_image, plain, atol=1e-6)


def test_photometrics_take_bytes_and_leave_them():
    x = torch.randint(256, (4, 1, 40, 40), dtype=torch.uint8)
    table = torch.tensor([[1.3, 0, 0.7, 1, sigma, 1] for sigma in (0.0, 0.5, 1.0, 2.0)])
    before, floats = x.clone(), x / 255
    found = photometrics(x, table, kernel_px=9)
    assert torch.equal(found, photometrics(floats, table, kernel_px=9))
    assert torch.equal(x, before)
    assert torch.equal(floats, before / 255)


def test_no_blur_leaves_every_bit():
    x = torch.rand(3, 1, 16, 16)
    assert torch.equal(blur(x, torch.zeros(3), kernel_px=5), x)
