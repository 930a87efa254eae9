"""Segmentation probes on planted patch features."""

import numpy as np
import pytest
import torch
from evaluation_material import disc, png

from sonoforge_trainer.evaluate.errors import EvaluationDataError
from sonoforge_trainer.evaluate.segment import (
    SegmentProblem,
    class_shares,
    decode_mask,
    segment_probe,
    training_patches,
    upsampled_classes,
)

CPU = torch.device("cpu")
GRID = (8, 8)


def scene(seed=0, informative=("train", "val", "test")):
    """Discs whose patch features are their share of the disc, mixed into 12 dimensions, with noise; or noise alone."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(2, 12))
    patches, masks, groups = {}, {}, {}
    for split, images in (("train", 20), ("val", 8), ("test", 12)):
        discs = [disc(*random.uniform(10, 22, 2), random.uniform(5, 9)) for _ in range(images)]
        shares = np.stack([class_shares(d, 2, GRID).numpy() for d in discs])
        features = shares @ mixing if split in informative else np.zeros((images, 64, 12))
        patches[split] = (features + 0.1 * random.normal(size=(images, 64, 12))).astype(np.float16)
        masks[split] = [png(d) for d in discs]
        groups[split] = np.arange(images)
    return SegmentProblem(("background", "head"), GRID, patches, masks, groups)


def test_a_planted_structure_is_found_by_both_probes():
    finding = segment_probe(scene(), (10, 20), temperature=0.07, resamples=50, seed=0, device=CPU)
    for method in ("knn", "logreg"):
        assert finding.scores[f"{method}_dice_foreground"].value > 0.85
        assert finding.details[method]["iou"]["head"] < finding.details[method]["dice"]["head"]
    method = finding.chosen.split()[0]
    assert finding.scores["dice_foreground"] == finding.scores[f"{method}_dice_foreground"]
    assert finding.scores["dice_foreground_per_image"].low is not None
    assert set(finding.details["logreg"]["dice"]) == {"background", "head"}


def test_nothing_is_found_in_noise_although_the_background_alone_looks_good():
    finding = segment_probe(scene(informative=()), (10,), temperature=0.07, resamples=0, seed=0, device=CPU)
    assert finding.scores["logreg_dice_foreground"].value < 0.3
    assert finding.scores["dice_mean"].value > finding.scores["dice_foreground"].value + 0.2


def test_validation_scores_are_of_the_validation_images_and_of_what_was_chosen_by_them():
    blind = scene(informative=("train", "val"))
    finding = segment_probe(blind, (10, 20), temperature=0.07, resamples=0, seed=0, device=CPU)
    scores = {metric: score.value for metric, score in finding.scores.items()}
    method, candidate = finding.chosen.split()
    assert scores["val_dice_foreground"] == finding.details[method]["validation_dice_foreground"][candidate]
    assert scores["val_dice_foreground"] > 0.85 > scores["dice_foreground"] + 0.3
    for name in ("knn", "logreg"):
        found = finding.details[name]["validation_dice_foreground"]
        assert scores[f"val_{name}_dice_foreground"] == max(found.values())
    assert {m for m in scores if m.startswith("val_")} == {f"val_{m}" for m in scores if not m.startswith("val_")}


def test_images_without_any_foreground_have_no_foreground_scores_and_are_no_fault():
    problem = scene()
    empty = {split: [png(np.zeros((32, 32)))] * len(masks) for split, masks in problem.masks.items()}
    bare = SegmentProblem(problem.classes, problem.grid, problem.patches, empty, problem.groups)
    finding = segment_probe(bare, (10,), temperature=0.07, resamples=0, seed=0, device=CPU)
    assert finding.scores["val_dice_mean"].value == finding.scores["dice_mean"].value == 1
    assert not [name for name in finding.scores if name.endswith("dice_foreground")]


def test_the_numbers_are_the_same_each_time():
    first, second = (
        segment_probe(scene(), (10,), temperature=0.07, resamples=20, seed=0, device=CPU) for _ in range(2)
    )
    assert first == second


def test_shares_of_a_patch_are_areas_and_sum_to_one():
    mask = np.zeros((4, 4), np.uint8)
    mask[0, 0] = 1
    mask[2:, 2:] = 2
    assert class_shares(mask, 3, (2, 2)).tolist() == [[0.75, 0.25, 0], [1, 0, 0], [1, 0, 0], [0, 0, 1]]


def test_a_mask_that_is_no_multiple_of_the_grid_still_has_shares_that_sum_to_one():
    shares = class_shares(disc(16, 16, 8)[:29, :31], 2, GRID)
    assert torch.allclose(shares.sum(1), torch.ones(64))


def test_predictions_are_compared_at_the_size_of_the_mask():
    """Half the grid is class 1: bilinear upsampling to an odd, not square size puts the border in the middle."""
    probabilities = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    classes = upsampled_classes(probabilities, (3, 10))
    assert classes.tolist() == [[0] * 5 + [1] * 5] * 3


def test_the_training_set_has_the_same_number_of_patches_of_every_image_and_is_bounded():
    features, shares = training_patches(scene(), seed=0, limit=100)
    assert features.shape == (100, 12)
    assert shares.shape == (100, 2)
    again, _ = training_patches(scene(), seed=0, limit=100)
    assert (features == again).all()
    few, _ = training_patches(scene(), seed=0, limit=5)
    assert len(few) == 5


def test_a_mask_value_without_a_class_is_refused():
    with pytest.raises(EvaluationDataError, match="has the value 7, but the manifest names 2 mask classes"):
        decode_mask(png(np.full((4, 4), 7)), 2)


def test_a_colour_mask_is_refused():
    with pytest.raises(EvaluationDataError, match="mode RGB"):
        decode_mask(png(np.zeros((4, 4, 3))), 2)


def test_a_mask_that_does_not_decode_is_a_fault_of_the_set():
    with pytest.raises(EvaluationDataError, match="a mask cannot be decoded"):
        decode_mask(png(np.zeros((40, 40)))[:40], 2)
