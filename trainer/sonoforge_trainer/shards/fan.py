"""Scan geometry of a phantom: beams of a probe, and how their samples become pixels of a fan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
"""float32 in all but set-up."""


@dataclass(frozen=True)
class Fan:
    """One scanner. Lengths are in units of the imaged depth; r = samples along a beam, a = beams, p = pixels inside."""

    scanner: str
    """Kind and number, for example convex-3."""
    height: int
    """Pixels of the image."""
    width: int
    """Pixels of the image."""
    x_ra: Floats
    """Lateral position of each sample, 0 in the middle."""
    z_ra: Floats
    """Depth of each sample below the middle of the probe."""
    beam_x_ra: Floats
    """Lateral part of the direction of the beam at each sample."""
    beam_z_ra: Floats
    """Part of that direction in depth."""
    transfer_ra: Floats
    """Point-spread function in the frequency domain, scaled so that white noise keeps its variance."""
    inside_p: NDArray[np.int32]
    """Flat pixel numbers inside the fan."""
    taps_4p: NDArray[np.int32]
    """Bilinear interpolation: flat numbers of the four samples around each pixel."""
    weights_4p: Floats
    """Their weights."""

    def convert(self, samples_ra: Floats) -> Floats:
        """Scan conversion, bilinear: samples to pixels [height, width], 0 outside the fan."""
        image = np.zeros(self.height * self.width, np.float32)
        image[self.inside_p] = (samples_ra.ravel()[self.taps_4p] * self.weights_4p).sum(0)
        return image.reshape(self.height, self.width)

    def convert_labels(self, labels_ra: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Scan conversion of class indices: the nearest sample, 0 outside the fan."""
        image = np.zeros(self.height * self.width, np.uint8)
        nearest_p = np.take_along_axis(self.taps_4p, self.weights_4p.argmax(0)[None], 0)[0]
        image[self.inside_p] = labels_ra.ravel()[nearest_p]
        return image.reshape(self.height, self.width)


def draw_fan(number: int, size: int, rng: np.random.Generator) -> Fan:
    """A scanner with a convex, sector or linear probe whose images have the short side `size` in pixels."""
    kind = ("convex", "convex", "sector", "linear")[number % 4]
    radius, half_angle, ratios = {
        "convex": (rng.uniform(0.3, 0.6), rng.uniform(0.5, 0.68), (1.0, 1.17, 1.33)),
        "sector": (rng.uniform(0.03, 0.12), rng.uniform(0.62, 0.8), (1.0, 1.17, 1.33)),
        # A linear probe is a convex one of a very large radius.
        "linear": (20.0, rng.uniform(0.42, 0.6) / 20.5, (0.75, 1.0, 1.17)),
    }[kind]
    ratio = float(rng.choice(ratios))
    height, width = (round(size / ratio), size) if ratio < 1 else (size, round(size * ratio))
    samples, beams = round(1.15 * size), size
    r_r = np.linspace(0, 1, samples, dtype=np.float32)[:, None] + radius
    angle_a = np.linspace(-half_angle, half_angle, beams, dtype=np.float32)[None]
    x_ra, z_ra = r_r * np.sin(angle_a), r_r * np.cos(angle_a) - radius

    # Pixels: the box around the fan fills the image up to a margin; a negative margin cuts the corners off.
    top, half_width = radius * np.cos(half_angle) - radius, (radius + 1) * np.sin(half_angle)
    fill = 1 - rng.uniform(-0.12, 0.06)
    scale = fill * min(height / (1 - top), width / (2 * half_width)) * rng.uniform(0.95, 1.1)
    column_w = (np.arange(width) - (width - 1) / 2) / scale
    row_h = (np.arange(height) - (height - scale * (1 - top)) / 2) / scale + top
    x_hw, z_hw = np.meshgrid(column_w, row_h)
    r_hw = (np.hypot(x_hw, z_hw + radius) - radius) * (samples - 1)
    a_hw = (np.arctan2(x_hw, z_hw + radius) / half_angle + 1) / 2 * (beams - 1)
    inside_p = np.flatnonzero((r_hw >= 0) & (r_hw <= samples - 1) & (a_hw >= 0) & (a_hw <= beams - 1))
    r_p, a_p = r_hw.ravel()[inside_p], a_hw.ravel()[inside_p]
    r0_p, a0_p = np.minimum(r_p.astype(int), samples - 2), np.minimum(a_p.astype(int), beams - 2)
    fr_p, fa_p = r_p - r0_p, a_p - a0_p
    taps_4p = np.stack([(r0_p + i) * beams + a0_p + j for i in (0, 1) for j in (0, 1)])
    weights_4p = np.stack([(1 - fr_p) * (1 - fa_p), (1 - fr_p) * fa_p, fr_p * (1 - fa_p), fr_p * fa_p])

    axial, lateral = rng.uniform(0.55, 0.9), rng.uniform(0.9, 1.7)  # standard deviations in samples and beams
    frequency_ra = (axial * np.fft.fftfreq(samples)[:, None]) ** 2 + (lateral * np.fft.fftfreq(beams)[None]) ** 2
    transfer_ra = np.exp(-2 * np.pi**2 * frequency_ra)
    transfer_ra /= np.sqrt((transfer_ra**2).mean())
    return Fan(
        f"{kind}-{number}",
        height,
        width,
        x_ra.astype(np.float32),
        z_ra.astype(np.float32),
        np.broadcast_to(np.sin(angle_a), x_ra.shape).astype(np.float32),
        np.broadcast_to(np.cos(angle_a), x_ra.shape).astype(np.float32),
        transfer_ra.astype(np.float32),
        inside_p.astype(np.int32),
        taps_4p.astype(np.int32),
        weights_4p.astype(np.float32),
    )
