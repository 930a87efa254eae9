"""Small images with planted structure, and a random backbone to train on them."""

from __future__ import annotations

import numpy as np
import torch
from evaluation_material import backbone_of, disc, model_card, png

from sonoforge_trainer.evaluate.finetune import FinetuneTask
from sonoforge_trainer.evaluate.segmentation import SegmentTask
from sonoforge_trainer.evaluate.tuning import Tunable

CPU = torch.device("cpu")
SIDE = 32
SIZES = {"train": 24, "val": 12, "test": 24}


def tunable(images: np.ndarray, *, seed: int = 0, **card: object) -> Tunable:
    """A random backbone of patches of 4 pixels with images [n, 32, 32] as rows 0..n-1."""
    made = model_card(**{"patch_size": 4, **card})
    pixels = {row: torch.from_numpy(image[None].astype(np.uint8)) for row, image in enumerate(images)}
    return Tunable(backbone_of(made, seed), made, SIDE, pixels, CPU)


def rows_by_split(sizes: dict[str, int] = SIZES) -> dict[str, np.ndarray]:
    """Rows of train, then val, then test."""
    starts = np.cumsum([0, *sizes.values()])
    return {split: np.arange(a, b) for split, a, b in zip(sizes, starts[:-1], starts[1:], strict=True)}


def noise(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(90, 20, (count, SIDE, SIDE))


def clipped(images: np.ndarray) -> np.ndarray:
    return images.round().clip(0, 255).astype(np.uint8)


def bright_discs(*, seed: int = 0, shuffled: bool = False, **card: object) -> tuple[Tunable, SegmentTask]:
    """Images with a bright disc, and the disc as mask; shuffled masks belong to other images of their split."""
    random = np.random.default_rng(seed)
    rows = rows_by_split()
    discs = [disc(*random.uniform(8, 24, 2), random.uniform(5, 9), SIDE) for _ in range(sum(SIZES.values()))]
    images = clipped(noise(len(discs), seed) + 90 * np.stack(discs))
    masks = {}
    for split, of_split in rows.items():
        order = np.roll(of_split, 1) if shuffled else of_split
        masks[split] = [png(discs[row]) for row in order]
    task = SegmentTask(("background", "disc"), rows, masks, {s: np.arange(len(r)) // 2 for s, r in rows.items()})
    return tunable(images, seed=seed, **card), task


def stripes(*, seed: int = 0, shuffled: bool = False, **card: object) -> tuple[Tunable, FinetuneTask]:
    """Images with horizontal or vertical stripes or none, and that as class; or with classes that mean nothing."""
    random = np.random.default_rng(seed)
    rows = rows_by_split()
    count = sum(SIZES.values())
    truth = np.arange(count) % 3
    wave = 60 * np.sign(np.sin(np.arange(SIDE) * np.pi / 4 + 0.1))
    patterns = np.stack([np.tile(wave[:, None], SIDE), np.tile(wave, (SIDE, 1)), np.zeros((SIDE, SIDE))])
    images = clipped(noise(count, seed) + patterns[truth])
    targets = {s: random.permutation(truth[r]) if shuffled else truth[r] for s, r in rows.items()}
    groups = {s: np.arange(len(r)) // 2 for s, r in rows.items()}
    return tunable(images, seed=seed, **card), FinetuneTask(("across", "down", "plain"), rows, targets, groups)
