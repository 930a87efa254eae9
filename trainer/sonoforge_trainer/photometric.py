"""Photometric augmentation: drawn per crop on the CPU, applied to a whole batch of crops on the device.

Operations and their order are those of DINOv2: colour jitter, gray-scale, Gaussian blur, solarisation, normalisation.
Inside the jitter the order is brightness, contrast, saturation, hue for every crop, where torchvision draws one: the
first three are linear in the image and commute, but for the clamp to 0..1 after each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from sonoforge_trainer.contract import AugmentConfig

UNIFORMS = 9
"""Random numbers that one crop takes."""
_BLUR_RADIUS = 4
_SOLARIZE_THRESHOLD = 128 / 255
_LUMA = (0.2989, 0.587, 0.114)


class _Column(IntEnum):
    BRIGHTNESS = 0
    CONTRAST = 1
    SATURATION = 2
    HUE = 3
    GRAYSCALE = 4
    BLUR_SIGMA = 5
    SOLARIZE = 6


@dataclass(frozen=True)
class Photometrics:
    """The parameters of n crops, in one tensor so that they travel as one."""

    values_n7: Tensor
    """float32 [n, 7]: one column for each property below."""

    @property
    def brightness(self) -> Tensor:
        """Factor of the image, 1 for none."""
        return self.values_n7[:, _Column.BRIGHTNESS]

    @property
    def contrast(self) -> Tensor:
        """Factor of the distance to the mean gray value, 1 for none."""
        return self.values_n7[:, _Column.CONTRAST]

    @property
    def saturation(self) -> Tensor:
        """Factor of the distance to the gray image, 1 for none; does nothing to gray images."""
        return self.values_n7[:, _Column.SATURATION]

    @property
    def hue(self) -> Tensor:
        """Shift of the hue in turns, 0 for none; does nothing to gray images."""
        return self.values_n7[:, _Column.HUE]

    @property
    def grayscale(self) -> Tensor:
        """Whether colour is dropped."""
        return self.values_n7[:, _Column.GRAYSCALE] > 0

    @property
    def blur_sigma(self) -> Tensor:
        """Standard deviation of the Gaussian blur in pixels, 0 for none."""
        return self.values_n7[:, _Column.BLUR_SIGMA]

    @property
    def solarize(self) -> Tensor:
        """Whether values from 128 on are inverted."""
        return self.values_n7[:, _Column.SOLARIZE] > 0

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Photometrics:
        """The same on a device."""
        return Photometrics(self.values_n7.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Photometrics:
        """The same in page-locked memory."""
        return Photometrics(self.values_n7.pin_memory())


def draw(
    uniforms_n9: NDArray[np.float64], augment: AugmentConfig, blur_n: ArrayLike, solarize_n: ArrayLike
) -> NDArray[np.float32]:
    """`Photometrics.values_n7` of n crops from uniform numbers [n, 9].

    `blur_n` and `solarize_n` hold the probability for each crop. One number decides whether a crop is jittered; the
    four factors then apply together, as torchvision's ColorJitter inside RandomApply.
    """
    u = uniforms_n9.T
    values_n7 = np.zeros((len(uniforms_n9), len(_Column)), dtype=np.float32)
    jittered_n = u[0] < augment.jitter
    for column, strength, numbers in (
        (_Column.BRIGHTNESS, augment.brightness, u[1]),
        (_Column.CONTRAST, augment.contrast, u[2]),
        (_Column.SATURATION, augment.saturation, u[3]),
    ):
        low = max(0.0, 1 - strength)
        values_n7[:, column] = np.where(jittered_n, low + (1 + strength - low) * numbers, 1)
    values_n7[:, _Column.HUE] = np.where(jittered_n, augment.hue * (2 * u[4] - 1), 0)
    values_n7[:, _Column.GRAYSCALE] = u[5] < augment.grayscale
    low, high = augment.blur_sigma
    values_n7[:, _Column.BLUR_SIGMA] = np.where(u[6] < np.asarray(blur_n), low + (high - low) * u[7], 0)
    values_n7[:, _Column.SOLARIZE] = u[8] < np.asarray(solarize_n)
    return values_n7


@torch.no_grad()
def apply(crops_u8_nchw: Tensor, photo: Photometrics, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Augment and normalise uint8 crops [n, C, H, W] to float32 on their device.

    Values stay in 0..1 up to the normalisation. No step waits for the device.
    """
    per_crop = (-1, 1, 1, 1)
    crops_nchw = crops_u8_nchw.float().div_(255)
    crops_nchw = adjust_brightness(crops_nchw, photo.brightness.view(per_crop))
    crops_nchw = adjust_contrast(crops_nchw, photo.contrast.view(per_crop))
    if crops_nchw.shape[1] == 3:
        crops_nchw = adjust_saturation(crops_nchw, photo.saturation.view(per_crop))
        crops_nchw = adjust_hue(crops_nchw, photo.hue.view(per_crop))
        crops_nchw = torch.where(photo.grayscale.view(per_crop), to_gray(crops_nchw), crops_nchw)
    crops_nchw = gaussian_blur(crops_nchw, photo.blur_sigma)
    crops_nchw = solarize(crops_nchw, photo.solarize.view(per_crop))
    mean_c = torch.tensor(mean, dtype=torch.float32).to(crops_nchw.device, non_blocking=True)
    std_c = torch.tensor(std, dtype=torch.float32).to(crops_nchw.device, non_blocking=True)
    return crops_nchw.sub_(mean_c.view(1, -1, 1, 1)).div_(std_c.view(1, -1, 1, 1))


def to_gray(crops_nchw: Tensor) -> Tensor:
    """Luma (ITU-R 601) [n, 1, H, W] of RGB crops; a gray crop is its own."""
    if crops_nchw.shape[1] == 1:
        return crops_nchw
    red, green, blue = crops_nchw.unbind(1)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue).unsqueeze(1)


def adjust_brightness(crops_nchw: Tensor, factor_n111: Tensor) -> Tensor:
    """Multiply by a factor for each crop."""
    return (crops_nchw * factor_n111).clamp_(0, 1)


def adjust_contrast(crops_nchw: Tensor, factor_n111: Tensor) -> Tensor:
    """Move away from, or towards, the crop's mean luma."""
    mean_n111 = to_gray(crops_nchw).mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(mean_n111, crops_nchw, factor_n111).clamp_(0, 1)


def adjust_saturation(crops_nchw: Tensor, factor_n111: Tensor) -> Tensor:
    """Move away from, or towards, the crop's luma."""
    return torch.lerp(to_gray(crops_nchw), crops_nchw, factor_n111).clamp_(0, 1)


def adjust_hue(crops_nchw: Tensor, turns_n111: Tensor) -> Tensor:
    """Turn the hue of RGB crops in HSV space; saturation and value stay.

    A colour is its value times one of three ramps of the hue h: channel = v - v s max(0, min(k, 4 - k, 1)) with
    k = (offset + 6 h) mod 6 and offsets 5, 3, 1 for red, green and blue.
    """
    red, green, blue = crops_nchw.unbind(1)
    value_nhw, lowest_nhw = crops_nchw.amax(1), crops_nchw.amin(1)
    chroma_nhw = value_nhw - lowest_nhw
    safe_nhw = torch.where(chroma_nhw > 0, chroma_nhw, 1)
    sixths_nhw = torch.where(
        value_nhw == red,
        (green - blue) / safe_nhw,
        torch.where(value_nhw == green, 2 + (blue - red) / safe_nhw, 4 + (red - green) / safe_nhw),
    )
    sixths_nhw = sixths_nhw + 6 * turns_n111.squeeze(1)
    channels = []
    for offset in (5, 3, 1):
        ramp_nhw = (offset + sixths_nhw) % 6
        ramp_nhw = torch.minimum(ramp_nhw, 4 - ramp_nhw).clamp_(0, 1)
        channels.append(value_nhw - chroma_nhw * ramp_nhw)
    return torch.stack(channels, dim=1).clamp_(0, 1)


def gaussian_blur(crops_nchw: Tensor, sigma_n: Tensor) -> Tensor:
    """Blur with a kernel of 9 and a standard deviation for each crop; 0 leaves a crop as it is. Borders are reflected.

    Two depthwise convolutions, one group for each channel of each crop. All crops take part, whatever their deviation,
    so the shapes never change.
    """
    count, channels, height, width = crops_nchw.shape
    offsets_k = torch.arange(-_BLUR_RADIUS, _BLUR_RADIUS + 1, dtype=torch.float32, device=crops_nchw.device)
    kernel_nk = torch.exp(-0.5 * (offsets_k / sigma_n.clamp_min(1e-3).unsqueeze(1)).square())
    kernel_nk = kernel_nk / kernel_nk.sum(dim=1, keepdim=True)
    groups = count * channels
    kernel_gk = kernel_nk.repeat_interleave(channels, dim=0)
    planes = crops_nchw.reshape(1, groups, height, width)
    # Autocast would blur in bf16.
    with torch.autocast(crops_nchw.device.type, enabled=False):
        for padding, shape in (
            ((_BLUR_RADIUS, _BLUR_RADIUS, 0, 0), (groups, 1, 1, 2 * _BLUR_RADIUS + 1)),
            ((0, 0, _BLUR_RADIUS, _BLUR_RADIUS), (groups, 1, 2 * _BLUR_RADIUS + 1, 1)),
        ):
            padded = torch.nn.functional.pad(planes, padding, mode="reflect")
            planes = torch.nn.functional.conv2d(padded, kernel_gk.view(shape), groups=groups)
    return planes.view(crops_nchw.shape)


def solarize(crops_nchw: Tensor, which_n111: Tensor) -> Tensor:
    """Invert values from 128 of 255 on, in the crops that `which_n111` names."""
    threshold_n111 = torch.where(which_n111, _SOLARIZE_THRESHOLD, torch.inf)
    return torch.where(crops_nchw >= threshold_n111, 1 - crops_nchw, crops_nchw)
