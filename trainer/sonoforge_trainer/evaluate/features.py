"""One pass over the images of an evaluation set: features for every frozen protocol at once.

Preprocessing is the model card's: its channels, mean and deviation, and its resolution unless the evaluation asks for
another. Images are resized to a square by antialiased bicubic interpolation without keeping their aspect, as the paper
does (arXiv 2506.19552): nothing of the fan is cut off, and a patch grid always covers the whole mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional
from torchvision.transforms.v2.functional import InterpolationMode

from sonoforge_trainer.contract import ModelCard
from sonoforge_trainer.evaluate.bootstrap import Floats
from sonoforge_trainer.evaluate.errors import EvaluationConfigError
from sonoforge_trainer.evaluate.metrics import Ints
from sonoforge_trainer.model import Backbone

BATCH = 32
"""Images in a forward pass."""

LAST_BLOCKS = 4
"""Blocks whose CLS tokens the linear probe joins."""

Inputs = Mapping[str, Mapping[str, tuple[str, ...]]]
"""For each protocol the inputs it may choose from: name to the pooled features that are joined."""

BACKBONE_INPUTS: Inputs = {
    "knn": {"cls": ("cls",), "mean_patch": ("mean_patch",)},
    "linear": {
        "cls": ("cls",),
        "cls+mean_patch": ("cls", "mean_patch"),
        "4xcls": ("cls_blocks",),
        "4xcls+mean_patch": ("cls_blocks", "mean_patch"),
    },
    "logreg": {"cls": ("cls",), "cls+mean_patch": ("cls", "mean_patch")},
    "fewshot": {"cls": ("cls",)},
    "health": {"cls": ("cls",)},
}
PIXEL_SIDE = 128
"""Side in pixels at which floors see an image."""

PIXEL_INPUTS: Inputs = {name: {"pixels": ("pixels",)} for name in BACKBONE_INPUTS}


class FeatureModel(Protocol):
    """What turns an image into features: a backbone, or a floor that learned nothing."""

    @property
    def channels(self) -> int:
        """1 for gray, 3 for RGB images."""
        ...

    @property
    def resolution(self) -> int:
        """Side in pixels of the square input."""
        ...

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patch grid."""
        ...

    @property
    def inputs(self) -> Inputs:
        """What each protocol may choose from."""
        ...

    def __call__(self, images_u8: Tensor, /) -> tuple[dict[str, Tensor], Tensor]:
        """Pooled features [n, d] by name and patch features [n, h * w, D] of [n, C, R, R] uint8 images."""
        ...


class Normalise:
    """The normalisation of a model card, for every protocol and every split."""

    def __init__(self, card: ModelCard, device: torch.device) -> None:
        self._mean, self._std = (
            torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (card.mean, card.std)
        )

    def __call__(self, images_nchw: Tensor) -> Tensor:
        """Images [n, C, H, W] scaled to 0..1, less the card's mean, over its deviation."""
        return (images_nchw - self._mean) / self._std


class BackboneModel:
    """A backbone as its card describes it."""

    inputs = BACKBONE_INPUTS

    def __init__(self, backbone: Backbone, card: ModelCard, resolution: int | None, device: torch.device) -> None:
        self.channels, self.resolution = card.in_channels, resolution or card.resolution
        if self.resolution % card.patch_size:
            nearest = max(1, round(self.resolution / card.patch_size)) * card.patch_size
            raise EvaluationConfigError(
                f"resolution {self.resolution} is not a multiple of the patch size {card.patch_size}; use {nearest}"
            )
        self.grid = (self.resolution // card.patch_size,) * 2
        self._backbone = backbone.eval().to(device)
        self._device = device
        self._normalise = Normalise(card, device)
        self._blocks = min(LAST_BLOCKS, card.depth)

    @torch.inference_mode()
    def __call__(self, images_u8: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """CLS and mean patch of the last block, and the CLS of the last four blocks; final norm on all."""
        images = self._normalise(images_u8.to(self._device).float() / 255)
        blocks = self._backbone.intermediate(images, self._blocks)
        last = blocks[-1]
        pooled = {
            "cls": last.cls,
            "mean_patch": last.patches.mean(1),
            "cls_blocks": torch.cat([block.cls for block in blocks], dim=1),
        }
        return pooled, last.patches


class PixelModel:
    """Raw pixels: a 32 x 32 gray thumbnail, and for segmentation the 8 x 8 pixels of each patch at 128 x 128."""

    channels, resolution, grid, inputs = 1, PIXEL_SIDE, (16, 16), PIXEL_INPUTS

    def __call__(self, images_u8: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Pixels scaled to 0..1."""
        images = images_u8.float() / 255
        thumbnail = torch.nn.functional.avg_pool2d(images, 4)
        patches = torch.nn.functional.unfold(images, 8, stride=8).transpose(1, 2)
        return {"pixels": thumbnail.flatten(1)}, patches


@dataclass(frozen=True)
class FeatureSet:
    """Features of the samples of a set, in the order of its manifest, of those that are in a split.

    `pooled` float32 [n, d] by name; `patches` float16 [m, h * w, D] of the samples `patch_rows` [m] only: those with a
    mask, and the gallery.
    """

    pooled: Mapping[str, Floats]
    patches: npt.NDArray[np.float16]
    patch_rows: Ints

    def joined(self, names: tuple[str, ...], rows: Ints) -> Floats:
        """Pooled features of some samples, joined side by side."""
        return np.concatenate([self.pooled[name][rows] for name in names], axis=1)

    def patches_of(self, rows: Ints) -> npt.NDArray[np.float16]:
        """Patch features of some samples that have them."""
        places = np.searchsorted(self.patch_rows, rows)
        assert (self.patch_rows[places] == rows).all()
        return self.patches[places]

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Everything by name, to be kept."""
        pooled = {f"pooled.{name}": values for name, values in self.pooled.items()}
        return {**pooled, "patches": self.patches, "patch_rows": self.patch_rows}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> FeatureSet:
        """The reverse of `arrays`."""
        pooled = {name.removeprefix("pooled."): v for name, v in arrays.items() if name.startswith("pooled.")}
        return cls(pooled, arrays["patches"], arrays["patch_rows"])


class FeaturePass:
    """Collects images one after the other and runs them through the model in batches."""

    def __init__(self, model: FeatureModel) -> None:
        self._model = model
        self._waiting: list[Tensor] = []
        self._wants_patches: list[bool] = []
        self._pooled: dict[str, list[Floats]] = {}
        self._patches: list[npt.NDArray[np.float16]] = []

    def add(self, image_u8: Tensor, *, patches: bool) -> None:
        """The next image [C, H, W] uint8, and whether its patch features are needed."""
        self._waiting.append(resized(image_u8, self._model.resolution))
        self._wants_patches.append(patches)
        if len(self._waiting) == BATCH:
            self._flush()

    def finish(self) -> FeatureSet:
        """The features of all images that were added."""
        if self._waiting:
            self._flush()
        assert self._wants_patches
        patch_rows = np.flatnonzero(self._wants_patches).astype(np.int64)
        patches = np.concatenate(self._patches) if self._patches else np.zeros((0, 0, 0), np.float16)
        return FeatureSet({n: np.concatenate(values) for n, values in self._pooled.items()}, patches, patch_rows)

    def _flush(self) -> None:
        pooled, patches = self._model(torch.stack(self._waiting))
        for name, values in pooled.items():
            self._pooled.setdefault(name, []).append(values.float().cpu().numpy())
        wanted = [i for i, wants in enumerate(self._wants_patches[-len(self._waiting) :]) if wants]
        if wanted:
            self._patches.append(patches[wanted].half().cpu().numpy())
        self._waiting.clear()


def resized(image_u8: Tensor, resolution: int) -> Tensor:
    """A square uint8 image [C, R, R] of [C, H, W]."""
    image: Tensor = functional.resize(
        image_u8, [resolution, resolution], interpolation=InterpolationMode.BICUBIC, antialias=True
    )
    return image
