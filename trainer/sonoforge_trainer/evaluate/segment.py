"""Segmentation probes on patch features without SGD: k-NN and logistic regression (the idea of CAPI, arXiv 2502.08769).

A mask becomes, for each patch, the share of every class in it. A fixed number of patches of each training image, drawn
by seed, makes the training set, so its size does not depend on the resolution. Predicted class probabilities on the
patch grid are upsampled bilinearly to the size of the image's own mask and compared there.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from sonoforge_trainer.contract import VALIDATION_PREFIX, Score
from sonoforge_trainer.evaluate.bootstrap import Floats
from sonoforge_trainer.evaluate.errors import EvaluationDataError
from sonoforge_trainer.evaluate.evidence import segmented
from sonoforge_trainer.evaluate.knn import fitting, neighbour_votes, normalised
from sonoforge_trainer.evaluate.logreg import Standardiser, fit_path
from sonoforge_trainer.evaluate.metrics import Ints, confusion_matrix
from sonoforge_trainer.evaluate.overlap import foreground_dice, overlap_details, overlap_scores
from sonoforge_trainer.evaluate.problem import Finding, best, on_validation

TRAIN_PATCHES = 10_000
"""Patches of the training set, over all images. Enough for a linear boundary, and a bank that k-NN gets through."""

VALIDATION_IMAGES = 64
"""Images of the validation split that selection looks at, evenly spaced."""

C_GRID = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Inverse penalties of the logistic regression on features of unit variance, strongest penalty first."""

_IMAGES = 16
_SHARE = 0.05


@dataclass(frozen=True)
class SegmentProblem:
    """Patch features and masks by split.

    `patches` [n, h * w, D], `masks` are index PNGs, one for each image; value v of a mask is class `classes[v]`, and
    class 0 is the background. Groups number the patients.
    """

    classes: tuple[str, ...]
    grid: tuple[int, int]
    patches: Mapping[str, npt.NDArray[np.floating[Any]]]
    masks: Mapping[str, Sequence[bytes]]
    groups: Mapping[str, Ints]

    def mask(self, split: str, image: int) -> npt.NDArray[np.uint8]:
        """Class of every pixel [H, W]. Raises EvaluationDataError for a value without a class."""
        return decode_mask(self.masks[split][image], len(self.classes))


def decode_mask(data: bytes, classes: int) -> npt.NDArray[np.uint8]:
    """Class of every pixel [H, W] of an index PNG. Raises EvaluationDataError for a value without a class."""
    try:
        picture = Image.open(io.BytesIO(data), formats=("PNG",))
        mode, mask = picture.mode, np.asarray(picture)
    except Exception as error:  # noqa: BLE001 - Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error ...
        raise EvaluationDataError(
            f"a mask cannot be decoded ({type(error).__name__}); verify the set with `sonoforge shards verify --decode`"
        ) from None
    if mode not in ("L", "P", "1"):
        raise EvaluationDataError(f"a mask has mode {mode}; masks are PNGs of class numbers (mode L or P)")
    mask = mask.astype(np.uint8)
    if int(mask.max(initial=0)) >= classes:
        raise EvaluationDataError(
            f"a mask has the value {int(mask.max())}, but the manifest names {classes} mask classes; build the shards "
            "with the missing names or map the value"
        )
    return mask


def validation_images(images: int) -> list[int]:
    """Which images of a validation split of so many selection looks at."""
    chosen = np.linspace(0, images - 1, min(images, VALIDATION_IMAGES)).round().astype(np.int64)
    return [int(image) for image in np.unique(chosen)]


def class_shares(mask_hw: npt.NDArray[np.uint8], classes: int, grid: tuple[int, int]) -> Tensor:
    """Share of every class in each patch [h * w, K]; rows sum to one."""
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(mask_hw.astype(np.int64)), classes)
    pooled = torch.nn.functional.adaptive_avg_pool2d(one_hot.permute(2, 0, 1).float(), grid)
    return pooled.flatten(1).T.contiguous()


def training_patches(problem: SegmentProblem, seed: int, limit: int = TRAIN_PATCHES) -> tuple[Floats, Tensor]:
    """Features [m, D] and class shares [m, K] of the drawn patches, an equal number of each training image."""
    patches = problem.patches["train"]
    images, per_image = patches.shape[:2]
    drawn = min(per_image, max(1, -(-limit // images)))
    chosen = np.arange(images) if images <= limit else np.linspace(0, images - 1, limit).round().astype(np.int64)
    features, shares = [], []
    for image in chosen:
        rows = np.sort(np.random.default_rng([seed, int(image)]).choice(per_image, drawn, replace=False))
        features.append(patches[image][rows].astype(np.float32))
        shares.append(class_shares(problem.mask("train", int(image)), len(problem.classes), problem.grid)[rows])
    return np.concatenate(features), torch.cat(shares)


Predict = Callable[[Floats], Mapping[str, Floats]]
"""Class probabilities [rows, K] of patch features [rows, D], for each candidate."""


def confusions(problem: SegmentProblem, split: str, predict: Predict, images: Sequence[int]) -> dict[str, Ints]:
    """Confusion counts [images, K, K] at mask resolution, for each candidate of `predict`."""
    counts: dict[str, list[Ints]] = {}
    classes, patches = len(problem.classes), problem.patches[split]
    for start in range(0, len(images), _IMAGES):
        batch = list(images[start : start + _IMAGES])
        rows = patches[batch].astype(np.float32).reshape(-1, patches.shape[-1])
        masks = [problem.mask(split, image) for image in batch]
        for candidate, probabilities in predict(rows).items():
            grids = torch.from_numpy(np.ascontiguousarray(probabilities, np.float32))
            grids = grids.reshape(len(batch), *problem.grid, classes).permute(0, 3, 1, 2)
            for grid, mask in zip(grids, masks, strict=True):
                predicted = upsampled_classes(grid, mask.shape)
                matrix = confusion_matrix(mask.reshape(-1).astype(np.int64), predicted.reshape(-1), classes)
                counts.setdefault(candidate, []).append(matrix)
    return {candidate: np.stack(matrices) for candidate, matrices in counts.items()}


def predicted_masks(problem: SegmentProblem, split: str, predict: Predict, images: Sequence[int]) -> list[Ints]:
    """Predicted classes [H, W] of some images at mask resolution, by a predictor of one candidate."""
    found = []
    for image in images:
        (probabilities,) = predict(problem.patches[split][image].astype(np.float32)).values()
        grid_khw = torch.from_numpy(np.ascontiguousarray(probabilities, np.float32))
        grid_khw = grid_khw.reshape(*problem.grid, len(problem.classes)).permute(2, 0, 1)
        found.append(upsampled_classes(grid_khw, problem.mask(split, image).shape))
    return found


def upsampled_classes(probabilities_khw: Tensor, size: tuple[int, ...]) -> Ints:
    """The most probable class of each pixel [H, W], after bilinear upsampling."""
    full = torch.nn.functional.interpolate(probabilities_khw[None], size=size, mode="bilinear", align_corners=False)[0]
    return full.argmax(0).numpy()


def segment_probe(
    problem: SegmentProblem, ks: Sequence[int], *, temperature: float, resamples: int, seed: int, device: torch.device
) -> Finding:
    """Both probes: select by pooled foreground Dice on validation, report Dice and IoU on both.

    Scores are `[val_]{dice|iou}_{mean|foreground}[_per_image]` of the candidate that is best on validation, and
    `[val_]{knn|logreg}_dice_foreground` of the best of each probe.
    """
    features, shares = training_patches(problem, seed)
    validation = validation_images(len(problem.masks["val"]))
    details: dict[str, object] = {
        "images": {split: len(masks) for split, masks in problem.masks.items()},
        "train_patches": len(features),
        "compared_at": "mask resolution",
    }
    winners: dict[str, float] = {}
    outcomes: dict[str, tuple[Ints, Predict]] = {}
    scores: dict[str, dict[str, Score]] = {}
    for method, candidates in (
        ("knn", _knn_candidates(features, shares, ks, temperature, device)),
        ("logreg", _logreg_candidates(features, shares)),
    ):
        val = confusions(problem, "val", candidates.all, validation)
        found = {n: foreground_dice(counts) for n, counts in val.items()}
        name = best(found)
        winner = f"{method} {name}"
        test = confusions(problem, "test", candidates.one(name), range(len(problem.masks["test"])))[name]
        winners[winner] = found[name]
        outcomes[winner] = (test, candidates.one(name))
        overlaps = overlap_scores(val[name], problem.groups["val"][validation], resamples=0, seed=seed)
        scores[winner] = overlap_scores(test, problem.groups["test"], resamples=resamples, seed=seed)
        scores[winner] |= on_validation({n: score.value for n, score in overlaps.items()})
        details[method] = {"validation_dice_foreground": found, **overlap_details(test, problem.classes)}
    chosen = best(winners)
    of_methods = {
        f"{prefix}{winner.split()[0]}_dice_foreground": of_winner[f"{prefix}dice_foreground"]
        for winner, of_winner in scores.items()
        for prefix in ("", VALIDATION_PREFIX)
        if f"{prefix}dice_foreground" in of_winner  # it is not defined where no mask has a foreground
    }
    counts, predict = outcomes[chosen]
    return Finding(
        {**scores[chosen], **of_methods},
        chosen,
        details,
        segmented(problem.classes, problem.groups["test"], counts),
        lambda images: predicted_masks(problem, "test", predict, images),
    )


@dataclass(frozen=True)
class _Candidates:
    """Predictors that share work: all of them at once for selection, one for the test split."""

    all: Predict
    one: Callable[[str], Predict]


def _knn_candidates(
    features: Floats, shares: Tensor, ks: Sequence[int], temperature: float, device: torch.device
) -> _Candidates:
    bank, votes = normalised(features, device), shares.to(device)

    def predictor(chosen: Sequence[int]) -> Predict:
        def predict(rows: Floats) -> Mapping[str, Floats]:
            batches = neighbour_votes(bank, votes, normalised(rows, device), chosen, temperature)
            columns = zip(*batches, strict=True)
            return {f"k={k}": torch.cat(list(c)).cpu().numpy() for k, c in zip(chosen, columns, strict=True)}

        return predict

    usable = fitting(ks, len(features))
    return _Candidates(predictor(usable), lambda name: predictor([k for k in usable if f"k={k}" == name]))


def _logreg_candidates(features: Floats, shares: Tensor) -> _Candidates:
    scale = Standardiser(features)
    # A patch on a border counts for each of its classes, by their shares: majority would erase thin structures.
    rows, targets = np.nonzero(shares.numpy() > _SHARE)
    weights = shares.numpy()[rows, targets].astype(np.float64)
    train = scale(features)[rows].astype(np.float32)
    path = fit_path(train, targets.astype(np.int64), shares.shape[1], C_GRID, weights)
    models = {f"C={c:g}": model for c, model in path}

    def predictor(names: Sequence[str]) -> Predict:
        def predict(patches: Floats) -> Mapping[str, Floats]:
            scaled = scale(patches).astype(np.float32)
            return {name: models[name].probabilities(scaled) for name in names}

        return predict

    return _Candidates(predictor(list(models)), lambda name: predictor([name]))
