"""Floors: the same protocols on features that nobody learned. A backbone that is not above them has learned nothing.

* raw-pixels: a 32 x 32 thumbnail; the pixels of a patch for segmentation
* hog: histograms of oriented gradients (Dalal and Triggs, 2005), 9 orientations, cells of 8 pixels at 128 x 128
* mean-mask: the mean mask of the training images, its threshold chosen on validation; the image is not looked at

The floor with random weights is the checkpoint of step 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from sonoforge_trainer.contract import Evaluation, Protocol, Score, is_validation_score
from sonoforge_trainer.evaluate.bootstrap import Floats
from sonoforge_trainer.evaluate.dataset import select
from sonoforge_trainer.evaluate.features import FeatureModel, PixelModel
from sonoforge_trainer.evaluate.hog import HogModel
from sonoforge_trainer.evaluate.overlap import foreground_dice, overlap_scores
from sonoforge_trainer.evaluate.problem import best
from sonoforge_trainer.evaluate.protocols import Clock, Material, named_scores, run_protocols, segment_problem_of
from sonoforge_trainer.evaluate.run import gather
from sonoforge_trainer.evaluate.segment import SegmentProblem, class_shares, confusions
from sonoforge_trainer.shards.reader import read_manifest
from sonoforge_trainer.storage import Storage

_WITHOUT_FLOOR = ("health", "segment", "finetune")
_THRESHOLDS = tuple(round(0.05 * n, 2) for n in range(1, 16))


def floors(evaluation: Evaluation, storage: Storage) -> dict[str, Score]:
    """Scores of every floor as `FLOOR:NAME-PROTOCOL/METRIC`, for example `raw-pixels:planes-knn/f1_macro`.

    Health and the protocols that train a backbone are left out, and so are validation scores: nothing is chosen among
    floors. Deterministic, on the CPU. Raises what `evaluate` raises for the data set.
    """
    manifest = read_manifest(evaluation.shards, storage)
    protocols: list[Protocol] = [name for name in evaluation.protocols if name not in _WITHOUT_FLOOR]
    if not protocols:
        return {}
    models: Mapping[str, FeatureModel] = {"raw-pixels": PixelModel(), "hog": HogModel()}
    found: dict[str, Score] = {}
    for floor, model in models.items():
        gathered = gather(evaluation.shards, model, manifest, storage, None)
        selection = select(gathered.table, evaluation)
        material = Material(evaluation, model, gathered.features, selection, torch.device("cpu"))
        scores = named_scores(run_protocols(material, Clock(), protocols))
        found |= {
            f"{floor}:{evaluation.name}-{name}": score
            for name, score in scores.items()
            if not is_validation_score(name)
        }
    if "segment-probe" in protocols:
        scores = mean_mask(segment_problem_of(material), resamples=evaluation.bootstrap, seed=evaluation.seed)
        found |= {f"mean-mask:{evaluation.name}-segment-probe/{name}": score for name, score in scores.items()}
    return found


def mean_mask(problem: SegmentProblem, *, resamples: int, seed: int) -> dict[str, Score]:
    """Overlap of every test mask with the mean training mask, seen at the resolution of the patch grid."""
    classes, patches = len(problem.classes), problem.grid[0] * problem.grid[1]
    shares = [class_shares(problem.mask("train", i), classes, problem.grid) for i in range(len(problem.masks["train"]))]
    mean = torch.stack(shares).mean(0).numpy()

    def predict(rows: Floats) -> Mapping[str, Floats]:
        # The background wins where no class is above the threshold.
        return {
            f"threshold={t:g}": np.tile(np.c_[np.full(patches, t), mean[:, 1:]], (len(rows) // patches, 1))
            for t in _THRESHOLDS
        }

    val = confusions(problem, "val", predict, range(len(problem.masks["val"])))
    chosen = best({name: foreground_dice(counts) for name, counts in val.items()})
    test = confusions(problem, "test", lambda rows: {chosen: predict(rows)[chosen]}, range(len(problem.masks["test"])))
    return overlap_scores(test[chosen], problem.groups["test"], resamples=resamples, seed=seed)
