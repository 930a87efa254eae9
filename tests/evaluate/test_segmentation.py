"""The `segment` protocol on images with a planted disc."""

import numpy as np
import pytest
import torch
from evaluation_material import png
from torch.nn import functional
from tuning_material import CPU, SIDE, bright_discs

from sonoforge_trainer.contract import SegmentOptions
from sonoforge_trainer.evaluate.metrics import confusion_matrix
from sonoforge_trainer.evaluate.overlap import foreground_dice
from sonoforge_trainer.evaluate.overlays import CASES, extremes
from sonoforge_trainer.evaluate.problem import best
from sonoforge_trainer.evaluate.segment import decode_mask
from sonoforge_trainer.evaluate.segmentation import (
    Segmenter,
    counts,
    draw_groups,
    segment,
    segment_loss,
    still_maps,
    train,
)

SMALL = {"steps": 40, "batch": 8, "validate_every": 20, "channels": 16, "learning_rate": 5e-3, "augment": False}
KINDS = {
    "linear on a frozen backbone": {"decoder": "linear"},
    "linear and tuned": {"decoder": "linear", "backbone": "tuned"},
    "UPerNet on a frozen backbone": {"decoder": "upernet"},
    "UPerNet and tuned": {"decoder": "upernet", "backbone": "tuned"},
}


def options(**changes):
    return SegmentOptions(**{**SMALL, **changes})


def found(made, **changes):
    return segment(*made, options(**changes), draws=2, resamples=20, seed=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_disc_is_found(kind):
    finding = found(bright_discs(), **KINDS[kind])
    assert finding.scores["dice_foreground"].value > 0.75
    assert finding.scores["iou_foreground"].value < finding.scores["dice_foreground"].value
    assert finding.scores["dice_foreground"].low < finding.scores["dice_foreground"].value
    assert finding.details["dice"].keys() == {"background", "disc"}


def test_a_planted_disc_is_found_with_augmented_images():
    assert found(bright_discs(), augment=True, steps=60).scores["dice_foreground"].value > 0.7


@pytest.mark.parametrize("decoder", ["linear", "upernet"])
def test_nothing_is_found_with_the_masks_of_other_images(decoder):
    """What remains is where discs usually are: about a third of overlap with any other disc."""
    right = found(bright_discs(), decoder=decoder).scores["dice_foreground"].value
    wrong = found(bright_discs(shuffled=True), decoder=decoder).scores["dice_foreground"].value
    assert wrong < 0.45 < right - 0.2


def test_the_numbers_are_the_same_each_time_and_others_with_another_seed():
    made = bright_discs()
    kind = {**KINDS["UPerNet and tuned"], "augment": True, "steps": 6, "validate_every": 3, "drop_path": 0.3}
    first = found(made, **kind)
    assert first == found(made, **kind)
    other = segment(*made, options(**kind), draws=2, resamples=20, seed=1)
    assert other.details["validation_dice_foreground"] != first.details["validation_dice_foreground"]


def test_the_best_step_on_validation_is_kept_and_its_validation_scores_are_reported():
    finding = found(bright_discs(), steps=20, validate_every=4, learning_rate=0.3)
    candidates = finding.details["validation_dice_foreground"]
    assert list(candidates) == ["step 4", "step 8", "step 12", "step 16", "step 20"]
    assert finding.chosen == best(candidates)
    assert min(candidates.values()) < max(candidates.values())
    assert finding.scores["val_dice_foreground"].value == max(candidates.values())
    on_test = {name for name in finding.scores if not name.startswith("val_")}
    assert {f"val_{name}" for name in on_test} == finding.scores.keys() - on_test
    of_images = np.array(finding.samples.counts).reshape(-1, 2, 2)
    assert foreground_dice(of_images) == finding.scores["dice_foreground"].value


def test_few_shots_are_means_over_draws_of_patients_with_their_deviation():
    source, task = bright_discs()
    finding = segment(source, task, options(shots=(2, 40), steps=20), draws=3, resamples=20, seed=0)
    few = finding.scores["2shot_dice_foreground"]
    of_draws = finding.details["shots"]["2"]["dice_foreground"]
    assert few.value == pytest.approx(np.mean(of_draws))
    assert few.deviation == pytest.approx(np.std(of_draws, ddof=1))
    assert few.deviation > 0
    assert finding.details["shots"]["2"]["train_images_of_each_draw"] == [4, 4, 4]
    assert finding.details["shots"]["40"]["train_images_of_each_draw"] == [0, 0, 0]
    assert "val_2shot_dice_foreground" in finding.scores
    assert not [name for name in finding.scores if "40shot" in name]


@pytest.mark.parametrize("backbone", ["frozen", "tuned"])
def test_the_masks_that_are_kept_are_those_that_the_scores_were_counted_on(backbone):
    """Few-shot draws come after it. A sum in another order may turn a pixel on a border over."""
    source, task = bright_discs()
    chosen = options(backbone=backbone, steps=12, validate_every=4, shots=(2,))
    finding = segment(source, task, chosen, draws=1, resamples=0, seed=0)
    shown = extremes(finding.samples)
    assert len(shown.images) == 2 * CASES
    for place, predicted in zip(shown.images, finding.masks(shown.images), strict=True):
        truth = decode_mask(task.masks["test"][place], 2).astype(np.int64)
        counted = confusion_matrix(truth.reshape(-1), predicted.reshape(-1), 2).reshape(-1)
        assert counted.tolist() == pytest.approx(finding.samples.counts[place], abs=2)


def test_nothing_is_shown_where_no_mask_has_a_foreground():
    source, task = bright_discs()
    from evaluation_material import png

    empty = {split: [png(np.zeros((SIDE, SIDE)))] * len(masks) for split, masks in task.masks.items()}
    bare = type(task)(task.classes, task.rows, empty, task.groups)
    finding = segment(source, bare, options(steps=40), draws=1, resamples=0, seed=0)
    assert extremes(finding.samples) is None


def test_a_draw_has_all_images_of_its_patients_and_draws_differ():
    groups = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    first = draw_groups(groups, 2, 1)
    assert sorted(np.bincount(groups[first], minlength=4)) == [0, 0, 2, 2]
    assert first.tolist() == draw_groups(groups, 2, 1).tolist()
    assert len({tuple(draw_groups(groups, 2, seed)) for seed in range(8)}) > 2
    assert not len(draw_groups(groups, 5, 0))


def test_a_frozen_backbone_does_not_change_and_a_tuned_copy_leaves_the_evaluated_one_alone():
    source, task = bright_discs()
    before = {name: value.clone() for name, value in source.backbone.state_dict().items()}
    for backbone in ("frozen", "tuned"):
        segment(source, task, options(backbone=backbone, steps=2), draws=1, resamples=0, seed=0)
        after = source.backbone.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
    frozen = Segmenter(source, 2, options(drop_path=0.5), 0)
    assert not frozen.backbone.training
    assert not [name for name, p in frozen.named_parameters() if p.requires_grad and name.startswith("backbone")]
    assert {name.split(".")[0] for g in frozen.optimiser(options()).param_groups for name in g["names"]} == {"head"}


@pytest.mark.parametrize("decoder", ["linear", "upernet"])
def test_one_pass_over_images_that_never_change_gives_what_a_pass_in_each_step_gives(decoder):
    source, task = bright_discs()
    chosen, places = options(decoder=decoder, steps=20, validate_every=5), np.array([3, 4, 9, 20, 21, 22])
    still = still_maps(source, task, chosen)
    once = train(source, task, places, chosen, still, seed=0)
    each = train(source, task, places, chosen, None, seed=0)
    assert once.candidates == pytest.approx(each.candidates, abs=0.01)
    assert len(still) == (1 if decoder == "linear" else 4)
    assert still_maps(source, task, options(backbone="tuned")) is None
    assert still_maps(source, task, options(augment=True)) is None


def test_overlap_is_counted_at_the_size_of_the_mask():
    source, task = bright_discs()
    larger = functional.interpolate(
        torch.from_numpy(decode_mask(task.masks["test"][0], 2).copy())[None, None], (50, 70)
    )
    masks = {**task.masks, "test": [png(larger[0, 0].numpy()), *task.masks["test"][1:]]}
    resized = type(task)(task.classes, task.rows, masks, task.groups)
    matrix = counts(Segmenter(source, 2, options(), 0), source, resized, "test", [0, 1])
    assert matrix.sum((1, 2)).tolist() == [50 * 70, SIDE * SIDE]


def test_the_loss_of_a_worked_example_is_the_one_worked_by_hand():
    """Two pixels of class 1 at probability 3/4. Cross-entropy is ln(4/3) = 0.2877. Soft Dice with one pixel added: of
    class 0 (0 + 1) / (0.5 + 1) = 2/3, of class 1 (2 * 1.5 + 1) / (1.5 + 2 + 1) = 8/9; the loss is 1 - 7/9 = 0.2222."""
    logits = torch.log(torch.tensor([0.25, 0.75])).view(1, 2, 1, 1).expand(1, 2, 1, 2)
    loss = segment_loss(logits, torch.ones(1, 1, 2, dtype=torch.int64))
    assert loss.item() == pytest.approx(0.28768 + 0.22222, abs=1e-4)


def test_a_batch_larger_than_the_training_split_repeats_its_images():
    source, task = bright_discs()
    finding = segment(source, task, options(batch=60, steps=1), draws=1, resamples=0, seed=0)
    assert finding.chosen == "step 1"
    assert source.device == CPU
