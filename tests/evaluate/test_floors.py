"""Floors: features that nobody learned, through the same protocols."""

import numpy as np
import torch
from evaluation_material import disc, png

from sonoforge_trainer.contract import Evaluation
from sonoforge_trainer.evaluate.floors import HogModel, floors, mean_mask
from sonoforge_trainer.evaluate.segment import SegmentProblem


def test_protocols_that_train_a_backbone_have_no_floor(phantoms, storage):
    request = Evaluation(name="set", shards=phantoms, protocols=("finetune", "segment", "health"), bootstrap=0)
    assert floors(request, storage) == {}


def test_floors_are_named_like_scores_and_the_same_each_time(phantoms, storage):
    evaluation = Evaluation(
        name="phantoms", shards=phantoms, protocols=("knn", "segment-probe", "health"), k=(5,), bootstrap=20
    )
    found = floors(evaluation, storage)
    assert {name.split("/")[0] for name in found} == {
        "raw-pixels:phantoms-knn",
        "raw-pixels:phantoms-segment-probe",
        "hog:phantoms-knn",
        "hog:phantoms-segment-probe",
        "mean-mask:phantoms-segment-probe",
    }
    assert floors(evaluation, storage) == found


def test_a_vertical_edge_is_a_horizontal_gradient():
    """Gradients point along x: orientation 0, which the first and the last of nine bins share."""
    picture = torch.zeros(1, 1, 128, 128, dtype=torch.uint8)
    picture[..., 64:] = 255
    _, cells = HogModel()(picture)
    histogram = cells[0].sum(0)
    assert histogram[0] == histogram[8] > 0
    assert histogram[1:8].abs().max() == 0


def test_a_change_of_brightness_does_not_change_the_blocks():
    picture = torch.randint(0, 120, (1, 1, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(HogModel()(picture)[0]["hog"], HogModel()(picture * 2)[0]["hog"], atol=1e-4)


def test_the_mean_mask_is_right_where_every_mask_is_the_same():
    masks = [png(disc(16, 16, 9))] * 4
    splits = ("train", "val", "test")
    problem = SegmentProblem(
        ("background", "head"),
        (8, 8),
        {s: np.zeros((4, 64, 1), np.float16) for s in splits},
        dict.fromkeys(splits, masks),
        {s: np.arange(4) for s in splits},
    )
    assert mean_mask(problem, resamples=0, seed=0)["dice_foreground"].value > 0.9
