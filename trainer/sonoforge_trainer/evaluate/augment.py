"""Augmentation of labelled images, by the kinds and strengths of the paper (arXiv 2506.19552).

Geometry comes first and works on uint8 pixels before normalisation, so that what an image leaves uncovered is black, as
outside of the fan, and class 0 in its mask. Every number is drawn by the caller: the same numbers give the same images.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from sonoforge_trainer.photometric import adjust_brightness, adjust_contrast

UNIFORMS = 14
"""Random numbers that one image takes."""

ROTATE, SHEAR = 30.0, 15.0
"""Largest rotation and shear in degrees."""

SCALE, TRANSLATE = 0.2, 0.2
"""Largest change of size, and largest shift as a part of the side."""

BRIGHTNESS = CONTRAST = 0.3
GAMMA = 0.2
NOISE = 0.05
"""Largest standard deviation of the noise, of pixels between 0 and 1."""

_PROBABILITY = 0.5
"""Of each of: affine map, horizontal flip, brightness and contrast, gamma, noise."""


def warp(images_u8: Tensor, masks_u8: Tensor | None, uniforms_nu: Tensor) -> tuple[Tensor, Tensor | None]:
    """Images [n, C, R, R] and masks [n, R, R], both uint8, moved by one random affine map and flip each.

    Images are sampled bilinearly and rounded, masks take the nearest class. `uniforms_nu` [n, UNIFORMS] in [0, 1).
    """
    grid = functional.affine_grid(affine_maps(uniforms_nu).to(images_u8.device), list(images_u8.shape), False)
    images = functional.grid_sample(images_u8.float(), grid, mode="bilinear", align_corners=False)
    warped = images.round_().clamp_(0, 255).to(torch.uint8)
    if masks_u8 is None:
        return warped, None
    masks = functional.grid_sample(masks_u8[:, None].float(), grid, mode="nearest", align_corners=False)
    return warped, masks[:, 0].round_().to(torch.uint8)


def affine_maps(uniforms_nu: Tensor) -> Tensor:
    """From places in the new image to places in the old one, both in -1..1: float32 [n, 2, 3]."""
    u = uniforms_nu.T.double()
    moved = u[0] < _PROBABILITY
    turn, shear = (torch.where(moved, math.radians(most) * (2 * u[i] - 1), 0) for i, most in ((1, ROTATE), (2, SHEAR)))
    size = torch.where(moved, 1 + SCALE * (2 * u[3] - 1), 1)
    # A shift by the whole side is 2 in these coordinates.
    right, down = (torch.where(moved, 2 * TRANSLATE * (2 * u[i] - 1), 0) for i in (4, 5))
    mirror = torch.where(u[6] < _PROBABILITY, -1.0, 1.0)
    cosine, sine, slope = torch.cos(turn), torch.sin(turn), torch.tan(shear)
    first = torch.stack([mirror * cosine / size, mirror * (cosine * slope - sine) / size, right], dim=1)
    second = torch.stack([sine / size, (sine * slope + cosine) / size, down], dim=1)
    return torch.stack([first, second], dim=1).float()


def shade(images_nchw: Tensor, uniforms_nu: Tensor, generator: torch.Generator) -> Tensor:
    """Images [n, C, R, R] between 0 and 1 with other brightness, contrast and gamma, and noise; still between 0 and 1.

    `generator` is on the CPU and draws the noise.
    """
    u = uniforms_nu.T.float().to(images_nchw.device)[..., None, None, None]
    lit = u[7] < _PROBABILITY
    images = adjust_brightness(images_nchw, torch.where(lit, 1 + BRIGHTNESS * (2 * u[8] - 1), 1.0))
    images = adjust_contrast(images, torch.where(lit, 1 + CONTRAST * (2 * u[9] - 1), 1.0))
    images = images ** torch.where(u[10] < _PROBABILITY, 1 + GAMMA * (2 * u[11] - 1), 1.0)
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    return (images + noise * torch.where(u[12] < _PROBABILITY, NOISE * u[13], 0.0)).clamp_(0, 1)
