"""Mixup, CutMix, label smoothing and augmentation."""

import numpy as np
import pytest
import torch

from sonoforge_trainer.evaluate.augment import UNIFORMS, affine_maps, shade, warp
from sonoforge_trainer.evaluate.mixing import cut, mix, soft_targets

IMAGES = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 8, 8)
"""Image n has the value n everywhere."""


def test_smoothed_targets_sum_to_one():
    """A share of 0.2 over four classes: 0.05 each, and 0.8 more for the true one."""
    assert soft_targets(torch.tensor([1]), 4, 0.2).tolist() == [pytest.approx([0.05, 0.85, 0.05, 0.05])]
    assert soft_targets(torch.tensor([2]), 3, 0.0).tolist() == [[0, 0, 1]]


def test_mixup_mixes_images_and_targets_in_the_same_shares():
    targets = torch.eye(4)
    images, mixed = mix(IMAGES, targets, np.random.default_rng(0), mixup=0.8, cutmix=0)
    assert mixed.sum(1).tolist() == pytest.approx([1] * 4)
    # Image n has value n, so its mean is that of the classes by their shares.
    assert torch.allclose(images.mean((1, 2, 3)), mixed @ torch.arange(4.0), atol=1e-5)
    assert not torch.equal(images, IMAGES)


def test_cutmix_counts_the_share_of_a_box_in_pixels():
    others = torch.tensor([1, 0, 3, 2])
    images, share = cut(IMAGES, others, 0.75, 0.5, 0.5)
    assert share == 1 - 16 / 64
    assert images[0, 0, 2:6, 2:6].unique().tolist() == [1]
    assert images[0, 0].sum() == 16
    corner, most = cut(IMAGES, others, 0.75, 0.0, 0.0)
    assert most == 1 - 4 / 64
    assert corner[0, 0].sum() == 4


def test_cutmix_mixes_images_and_targets_in_the_same_shares():
    for seed in range(5):
        images, mixed = mix(IMAGES, torch.eye(4), np.random.default_rng(seed), mixup=0, cutmix=1.0)
        assert torch.allclose(images.mean((1, 2, 3)), mixed @ torch.arange(4.0), atol=1e-5)


def test_with_both_some_batches_are_cut_and_some_mixed_and_with_none_nothing_happens():
    cuts = 0
    for seed in range(40):
        images, _ = mix(IMAGES, torch.eye(4), np.random.default_rng(seed), mixup=1.0, cutmix=1.0)
        cuts += bool(len(images[:1].unique()) > 1 or images[:1].unique().item() == int(images[:1].unique().item()))
    assert 8 < cuts < 32
    images, targets = mix(IMAGES, torch.eye(4), np.random.default_rng(0), mixup=0, cutmix=0)
    assert torch.equal(images, IMAGES)
    assert torch.equal(targets, torch.eye(4))


def still(**changes):
    """Numbers that leave an image as it is, but for some."""
    numbers = torch.full((1, UNIFORMS), 0.9, dtype=torch.float64)
    for place, value in changes.items():
        numbers[0, int(place[1:])] = value
    return numbers


def picture():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 1, 16, 16), dtype=np.uint8))


def test_geometry_leaves_the_pixels_of_an_image_alone_where_nothing_is_drawn():
    image = picture()
    warped, masks = warp(image, image[:, 0], still())
    assert torch.equal(warped, image)
    assert torch.equal(masks, image[:, 0])


def test_a_flip_mirrors_image_and_mask():
    image = picture()
    warped, masks = warp(image, image[:, 0], still(u6=0.1))
    assert torch.equal(warped, image.flip(3))
    assert torch.equal(masks, image[:, 0].flip(2))


def test_the_affine_map_of_worked_numbers():
    """Rotation (0.75 of -30..30) 15 degrees, no shear, size 1.1, shift by 0.1 of the side to the right."""
    (found,) = affine_maps(still(u0=0.1, u1=0.75, u2=0.5, u3=0.75, u4=0.75, u5=0.5))
    cosine, sine = np.cos(np.pi / 12) / 1.1, np.sin(np.pi / 12) / 1.1
    assert found.tolist() == [pytest.approx([cosine, -sine, 0.2]), pytest.approx([sine, cosine, 0.0])]


def test_image_and_mask_move_together_and_what_is_uncovered_is_black_and_background():
    square = torch.zeros(1, 1, 64, 64, dtype=torch.uint8)
    square[..., 20:44, 24:40] = 200
    for seed in range(8):
        numbers = torch.from_numpy(np.random.default_rng(seed).random((1, UNIFORMS)))
        numbers[0, 0] = 0.0
        warped, masks = warp(square, (square[:, 0] > 0).to(torch.uint8), numbers)
        overlap = ((warped[:, 0] > 100) & (masks > 0)).sum() / ((warped[:, 0] > 100) | (masks > 0)).sum()
        assert overlap > 0.9
        white, uncovered = warp(torch.full_like(square, 255), torch.ones(1, 64, 64, dtype=torch.uint8), numbers)
        assert set(uncovered.unique().tolist()) <= {0, 1}
        assert white[:, 0][uncovered == 0].float().mean() < 128


def test_shading_stays_between_black_and_white_and_follows_from_its_numbers():
    image = picture().float() / 255
    numbers = torch.zeros(1, UNIFORMS, dtype=torch.float64) + 0.3
    first, again = (shade(image, numbers, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(first, again)
    assert 0 <= first.min() < first.max() <= 1
    assert not torch.allclose(first, image, atol=0.02)
    assert torch.allclose(shade(image, still(), torch.Generator().manual_seed(0)), image, atol=1e-6)
