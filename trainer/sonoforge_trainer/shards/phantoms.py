"""Draws labelled speckle phantoms: a scene, fully developed speckle, attenuation, log compression and scan conversion.

Speckle is the envelope of circular complex Gaussian noise, weighted with the echo strength and filtered with the
point-spread function of the scanner, so its amplitude is Rayleigh distributed where the tissue is uniform (Wagner et
al., Statistics of speckle in ultrasound B-scans, 1983). Position, size, gain, contrast, depth gain, scanner and
distractors vary in every class alike, so that no simple statistic of the pixels tells the class.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sonoforge_trainer.shards.anatomy import STRUCTURES, Pose, Scene, tissue
from sonoforge_trainer.shards.fan import Fan, Floats, draw_fan

_SCANNERS = 8
_FRAME_CORRELATION = 0.85
"""Of the speckle of two frames of a clip."""
_COARSE = 7
"""Nodes on each side of the coarse grids that become smooth fields."""


@dataclass(frozen=True)
class PhantomRule:
    """Which phantoms there are. Equal rules give equal images (with the same numpy)."""

    count: int
    """Images."""
    size: int = 96
    """Short side in pixels."""
    seed: int = 0
    """Decides everything."""
    frames: int = 4
    """Near-duplicate frames in a clip."""
    clips: int = 6
    """Clips of a patient; each patient has the classes in turn."""


@dataclass(frozen=True)
class Identity:
    """Which patient, clip and frame an image is, and its class."""

    patient: int
    """Number of the patient."""
    clip: int
    """Number of the clip inside the patient."""
    frame: int
    """Number of the frame inside the clip."""
    label: str
    """Anatomical class."""
    scanner: int
    """Number of the scanner."""


@dataclass(frozen=True)
class Phantom:
    """An image with its mask, both [height, width]."""

    image_hw: NDArray[np.uint8]
    """Gray values."""
    mask_hw: NDArray[np.uint8]
    """Mask class of each pixel."""


class Phantoms:
    """All images of a rule, each drawn on its own in any order and from any thread."""

    def __init__(self, rule: PhantomRule) -> None:
        self._rule = rule
        self._fans = functools.lru_cache(_SCANNERS)(self._draw_fan)

    def identity(self, index: int) -> Identity:
        """Who image `index` (from 0) shows."""
        clip, frame = divmod(index, self._rule.frames)
        patient, clip_of_patient = divmod(clip, self._rule.clips)
        rng = self._rng(1, patient)
        scanner = int(rng.integers(_SCANNERS))
        labels = rng.permutation(sorted(STRUCTURES))
        return Identity(patient, clip_of_patient, frame, str(labels[clip_of_patient % len(labels)]), scanner)

    def scanner(self, index: int) -> str:
        """Name of the scanner that made image `index`."""
        return self._fans(self.identity(index).scanner).scanner

    def draw(self, index: int) -> Phantom:
        """Image `index` (from 0)."""
        who = self.identity(index)
        fan = self._fans(who.scanner)
        patient_rng = self._rng(2, who.patient)
        clip_rng = self._rng(3, who.patient, who.clip)
        frame_rng = self._rng(4, who.patient, who.clip, who.frame)
        thickness_db, patient_size = patient_rng.uniform(4, 16), patient_rng.uniform(1.0, 1.15)

        speckle_2ra = clip_rng.standard_normal((2, *fan.x_ra.shape), np.float32) * np.float32(_FRAME_CORRELATION**0.5)
        speckle_2ra += frame_rng.standard_normal((2, *fan.x_ra.shape), np.float32) * np.float32(
            (1 - _FRAME_CORRELATION) ** 0.5
        )
        scene = Scene(
            fan,
            _smooth(clip_rng, fan) * np.float32(clip_rng.uniform(1, 5)),
            np.zeros_like(fan.x_ra),
            np.zeros(fan.x_ra.shape, np.uint8),
        )
        tissue(scene, clip_rng.uniform)
        drift = frame_rng.normal(0, 1, 4)
        pose = Pose(
            clip_rng.uniform(-0.04, 0.04) + 0.012 * drift[0],
            clip_rng.uniform(0.48, 0.56) + 0.012 * drift[1],
            clip_rng.normal(0, 0.2) + 0.04 * drift[2],
            patient_size * clip_rng.uniform(1.0, 1.15) * (1 + 0.01 * drift[3]),
        )
        STRUCTURES[who.label](scene, pose, clip_rng.uniform)
        envelope_ra = _envelope(scene, speckle_2ra, thickness_db, clip_rng)
        return Phantom(_displayed(envelope_ra, fan, clip_rng), fan.convert_labels(scene.mask_ra))

    def _draw_fan(self, number: int) -> Fan:
        return draw_fan(number, self._rule.size, self._rng(5, number))

    def _rng(self, *path: int) -> np.random.Generator:
        return np.random.default_rng((self._rule.seed, *path))


def _smooth(rng: np.random.Generator, fan: Fan) -> Floats:
    """A smooth random field of unit variance on the samples of a scan."""
    samples, beams = fan.x_ra.shape
    return _upsampling(samples) @ rng.standard_normal((_COARSE, _COARSE), np.float32) @ _upsampling(beams).T


@functools.cache
def _upsampling(length: int) -> Floats:
    """Cosine interpolation from the coarse nodes, [length, nodes]."""
    position = np.linspace(0, _COARSE - 1, length)[:, None]
    distance = np.minimum(np.abs(position - np.arange(_COARSE)[None]), 1)
    return ((1 + np.cos(np.pi * distance)) / 2).astype(np.float32)


def _envelope(scene: Scene, speckle_2ra: Floats, thickness_db: float, rng: np.random.Generator) -> Floats:
    """Received amplitude in dB relative to soft tissue, before the display."""
    step = np.float32(1 / scene.fan.x_ra.shape[0])
    depth_r = np.linspace(0, 1, scene.fan.x_ra.shape[0], dtype=np.float32)[:, None]
    shadow_ra = np.cumsum(scene.attenuation_ra, 0) * step
    # Tissue attenuation less what the depth gain gives back, an error of the depth gain, and poor contact at the sides.
    loss_r = thickness_db * depth_r + rng.uniform(-9, 9) * np.cos(np.pi * depth_r * rng.uniform(0.5, 2))
    contact_ra = np.minimum(_smooth(rng, scene.fan)[:1] * rng.uniform(0, 9) + rng.uniform(0, 6), 0)
    received_ra = scene.echo_ra - np.minimum(shadow_ra, 60) - loss_r + contact_ra
    amplitude_ra = np.exp(received_ra * np.float32(np.log(10) / 20))
    field_ra = np.empty(amplitude_ra.shape, np.complex64)
    field_ra.real, field_ra.imag = speckle_2ra[0] * amplitude_ra, speckle_2ra[1] * amplitude_ra
    field_ra = np.fft.ifft2(np.fft.fft2(field_ra) * scene.fan.transfer_ra)
    noise = 10 ** (rng.uniform(-48, -26) / 10)
    power_ra = np.square(field_ra.real) + np.square(field_ra.imag) + np.float32(noise)
    return (np.float32(10) * np.log10(power_ra)).astype(np.float32)


def _displayed(envelope_ra: Floats, fan: Fan, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Log compression to 8 bits with gain, dynamic range and gray curve, then scan conversion."""
    dynamic_range = rng.uniform(42, 60)
    white = rng.uniform(11, 24)
    gray_ra = np.clip((envelope_ra - np.float32(white)) / np.float32(dynamic_range) + 1, 0, 1)
    gray_ra = gray_ra ** np.float32(rng.uniform(0.8, 1.5))
    return (fan.convert(gray_ra) * np.float32(255) + np.float32(0.5)).astype(np.uint8)
