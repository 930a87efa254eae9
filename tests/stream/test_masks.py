import numpy as np
import pytest

from sonoforge_trainer.contract import MaskConfig
from sonoforge_trainer.masks import block_mask, draw_masks, masked_counts


def test_targets_are_the_middles_of_equal_slices_of_the_ratio_range():
    """Four of eight crops, ratios .15 .25 .35 .45 of 196 patches."""
    assert masked_counts(8, 196, MaskConfig(probability=0.5, ratio=(0.1, 0.5))) == [29, 49, 69, 88]


def test_a_run_without_masks_has_none():
    assert masked_counts(8, 196, MaskConfig(probability=0)) == []
    assert masked_counts(8, 196, MaskConfig(ratio=(0, 0))) == []
    assert not draw_masks(8, 14, MaskConfig(probability=0), 0, 1, 2).any()


@pytest.mark.parametrize(("grid", "crops"), [(14, 16), (8, 16), (16, 128), (4, 6), (2, 4), (1, 2)])
def test_every_micro_batch_masks_the_same_number_of_patches(grid, crops):
    config = MaskConfig()
    counts = masked_counts(crops, grid * grid, config)
    for step in range(20):
        masks = draw_masks(crops, grid, config, 3, step, 1)
        assert masks.shape == (crops, grid * grid)
        assert sorted(masks.sum(axis=1).tolist()) == [0] * (crops - len(counts)) + counts


def test_masks_are_a_function_of_their_key():
    first, again, other = (draw_masks(8, 14, MaskConfig(), 3, step, 0) for step in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_every_crop_is_masked_about_as_often_and_as_much():
    masks = np.stack([draw_masks(8, 14, MaskConfig(), 3, step, 0) for step in range(400)])
    assert masks.any(axis=2).mean(axis=0).tolist() == pytest.approx([0.5] * 8, abs=0.08)
    assert masks.mean(axis=(0, 2)).tolist() == pytest.approx([0.15] * 8, abs=0.03)


def test_masks_are_blocks_and_not_salt():
    """Most neighbours of a masked patch are masked; for single patches drawn at random three in ten would be."""
    masks = np.stack([block_mask(14, 59, 0, index) for index in range(100)])
    pairs = masks[:, :, :-1] & masks[:, :, 1:]
    assert pairs.sum() / masks[:, :, :-1].sum() > 0.7


def test_no_patch_is_never_or_always_masked():
    """Rectangles lie inside the grid, so corners (4 %) are masked less often than the middle (about a half)."""
    masks = np.stack([block_mask(14, 59, 0, index) for index in range(400)]).mean(axis=0)
    assert 0.02 < masks.min() < masks.max() < 0.7
