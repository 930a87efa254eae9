"""What a phantom shows: structures as echo strength and attenuation on the samples of a scan.

Lengths are in units of the imaged depth. Echo is in dB relative to soft tissue, attenuation in dB per unit of depth
beyond that of soft tissue (both ways).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sonoforge_trainer.shards.fan import Fan, Floats

MASK_CLASSES = ("background", "head", "abdomen", "stomach", "femur", "heart-chamber", "spine")
"""Names of the mask values 0 to 6."""
Uniform = Callable[[float, float], float]


@dataclass
class Scene:
    """What is under the probe, [samples, beams]."""

    fan: Fan
    """The scanner that looks."""
    echo_ra: Floats
    """Echo in dB relative to soft tissue."""
    attenuation_ra: Floats
    """Attenuation in dB per unit of depth beyond that of tissue."""
    mask_ra: NDArray[np.uint8]
    """Mask class of each sample."""


@dataclass(frozen=True)
class Pose:
    """Where a structure lies."""

    x: float
    """Lateral position, 0 in the middle, in units of the imaged depth."""
    z: float
    """Depth, in units of the imaged depth."""
    angle: float
    """Radians."""
    size: float
    """Factor on its lengths."""

    def local(self, scene: Scene) -> tuple[Floats, Floats]:
        """Coordinates of every sample along (u) and across (v) the structure, before its size is applied."""
        cosine, sine = np.float32(np.cos(self.angle)), np.float32(np.sin(self.angle))
        dx_ra, dz_ra = scene.fan.x_ra - np.float32(self.x), scene.fan.z_ra - np.float32(self.z)
        scale = np.float32(1 / self.size)
        return (cosine * dx_ra + sine * dz_ra) * scale, (cosine * dz_ra - sine * dx_ra) * scale

    def facing(self, scene: Scene, normal_u: Floats | float, normal_v: Floats | float) -> Floats:
        """How squarely the beam meets a surface with this normal: 0 along it, 1 straight on. Echo is strongest at 1."""
        cosine, sine = np.float32(np.cos(self.angle)), np.float32(np.sin(self.angle))
        beam_u_ra = cosine * scene.fan.beam_x_ra + sine * scene.fan.beam_z_ra
        beam_v_ra = cosine * scene.fan.beam_z_ra - sine * scene.fan.beam_x_ra
        length = np.sqrt(np.square(normal_u) + np.square(normal_v)) + np.float32(1e-6)
        facing_ra: Floats = np.square((beam_u_ra * normal_u + beam_v_ra * normal_v) / length)
        return facing_ra.astype(np.float32)


def head(scene: Scene, pose: Pose, uniform: Uniform) -> None:
    """A skull, dark brain, the midline echo and a pair of ventricles."""
    a, b = 0.31, 0.31 * uniform(0.72, 0.86)
    u_ra, v_ra = pose.local(scene)
    e_ra = np.hypot(u_ra / a, v_ra / b)
    inside_ra = e_ra < 1
    scene.echo_ra[inside_ra] = scene.echo_ra[inside_ra] * 0.5 - uniform(4, 12)
    scene.echo_ra += uniform(8, 16) * _ridge(v_ra, 0.009) * (np.abs(u_ra) < uniform(0.5, 0.85) * a)
    for side in (-1, 1):
        u, v = uniform(-0.3, 0.1) * a, side * uniform(0.3, 0.45) * b
        scene.echo_ra -= uniform(4, 14) * (np.hypot((u_ra - u) / (0.4 * a), (v_ra - v) / (0.16 * b)) < 1)
    rim_ra = _ridge((e_ra - 1) * b, uniform(0.012, 0.022))
    facing_ra = pose.facing(scene, u_ra / a**2, v_ra / b**2)
    scene.echo_ra += rim_ra * (uniform(6, 10) + uniform(10, 16) * facing_ra)
    scene.attenuation_ra += rim_ra * uniform(20, 120)
    scene.mask_ra[inside_ra] = 1


def abdomen(scene: Scene, pose: Pose, uniform: Uniform) -> None:
    """A round body with a weak wall, a stomach bubble, a vein, and a vertebra with its shadow."""
    a, b = 0.27, 0.27 * uniform(0.86, 1.0)
    u_ra, v_ra = pose.local(scene)
    e_ra = np.hypot(u_ra / a, v_ra / b)
    inside_ra = e_ra < 1
    scene.echo_ra[inside_ra] = scene.echo_ra[inside_ra] * 0.6 + uniform(-5, 4)
    scene.mask_ra[inside_ra] = 2
    stomach_ra = (
        np.hypot(
            (u_ra - uniform(-0.1, 0.3) * a) / (uniform(0.2, 0.36) * a), (v_ra + 0.5 * b) / (uniform(0.18, 0.28) * b)
        )
        < 1
    )
    scene.echo_ra[stomach_ra] = uniform(-34, -18)
    scene.mask_ra[stomach_ra] = 3
    vein_ra = np.abs(v_ra - uniform(0.1, 0.3) * b - uniform(-1.5, 1.5) * np.square(u_ra) / a) < uniform(0.014, 0.026)
    scene.echo_ra -= uniform(12, 22) * (vein_ra & (u_ra > -0.1 * a) & (u_ra < 0.75 * a))
    bone_ra = np.exp(-(np.square(u_ra + 0.72 * a) + np.square(v_ra - 0.1 * b)) / np.float32(0.036**2))
    scene.echo_ra += uniform(14, 22) * bone_ra
    scene.attenuation_ra += uniform(60, 160) * bone_ra
    facing_ra = pose.facing(scene, u_ra, v_ra)
    scene.echo_ra += _ridge((e_ra - 1) * b, 0.02) * (uniform(2, 7) + uniform(2, 8) * facing_ra)


def femur(scene: Scene, pose: Pose, uniform: Uniform) -> None:
    """A slightly bent bright rod with a shadow below."""
    half_length, thickness, bend = uniform(0.17, 0.3), uniform(0.013, 0.022), uniform(-0.25, 0.25)
    u_ra, v_ra = pose.local(scene)
    v_ra = v_ra - np.float32(bend) * np.square(u_ra)
    along_ra = (np.abs(u_ra) < half_length).astype(np.float32)
    rod_ra = along_ra * _ridge(v_ra, thickness)
    facing_ra = pose.facing(scene, 0.0, 1.0)
    scene.echo_ra += rod_ra * (uniform(8, 12) + uniform(10, 16) * facing_ra)
    scene.attenuation_ra += rod_ra * uniform(150, 500)
    scene.mask_ra[(along_ra > 0) & (np.abs(v_ra) < 1.4 * thickness)] = 4


def heart(scene: Scene, pose: Pose, uniform: Uniform) -> None:
    """Four dark chambers between walls and septa."""
    a, b = 0.25, 0.25 * uniform(0.75, 0.9)
    u_ra, v_ra = pose.local(scene)
    e_ra = np.hypot(u_ra / a, v_ra / b)
    inside_ra = e_ra < 1
    scene.echo_ra[inside_ra] = scene.echo_ra[inside_ra] * 0.5 + uniform(-2, 6)
    dark = uniform(-32, -18)
    valves = uniform(-0.12, 0.12)
    for sign_u, length in ((-1, uniform(0.3, 0.38)), (1, uniform(0.38, 0.46))):
        for sign_v in (-1, 1):
            width = uniform(0.27, 0.38)
            u, v = (valves + sign_u * (length + 0.06)) * a, sign_v * (width + uniform(0.05, 0.09)) * b
            chamber_ra = (np.hypot((u_ra - u) / (length * a), (v_ra - v) / (width * b)) < 1) & inside_ra
            scene.echo_ra[chamber_ra] = dark
            scene.mask_ra[chamber_ra] = 5
    facing_ra = pose.facing(scene, u_ra, v_ra)
    scene.echo_ra += _ridge((e_ra - 1) * b, 0.018) * (uniform(1, 6) + uniform(2, 8) * facing_ra)


def spine(scene: Scene, pose: Pose, uniform: Uniform) -> None:
    """Two rows of bright spots along a gentle curve, each with a short shadow."""
    half_length, spacing, bend = uniform(0.28, 0.42), uniform(0.05, 0.075), uniform(-0.5, 0.5)
    gap, spot = uniform(0.022, 0.042), uniform(0.012, 0.017)
    u_ra, v_ra = pose.local(scene)
    v_ra = v_ra - np.float32(bend) * np.square(u_ra)
    along_ra = np.abs(u_ra) < half_length
    beat_ra = _ridge((u_ra + 9.0) % np.float32(spacing) - np.float32(spacing / 2), spot) * along_ra
    spots_ra = beat_ra * (_ridge(v_ra - gap, spot) + uniform(0.6, 1.0) * _ridge(v_ra + gap, spot))
    scene.echo_ra -= uniform(2, 10) * (along_ra & (np.abs(v_ra) < gap))
    scene.echo_ra += spots_ra * uniform(19, 28)
    scene.attenuation_ra += spots_ra * uniform(20, 140)
    scene.mask_ra[along_ra & (np.abs(v_ra) < gap + 1.5 * spot)] = 6


def nothing(scene: Scene, pose: Pose, uniform: Uniform) -> None:
    """Tissue only."""


STRUCTURES: dict[str, Callable[[Scene, Pose, Uniform], None]] = {
    "abdomen": abdomen,
    "background": nothing,
    "femur": femur,
    "head": head,
    "heart": heart,
    "spine": spine,
}
"""Class name to what is drawn."""


def tissue(scene: Scene, uniform: Uniform) -> None:
    """What lies around in every class: skin and muscle layers, cysts, bright nodules and fascia."""
    x_ra, z_ra = scene.fan.x_ra, scene.fan.z_ra
    for _ in range(round(uniform(1, 4))):
        depth, tilt, wave = uniform(0.02, 0.22), uniform(-0.15, 0.15), uniform(-0.3, 0.3)
        line_ra = z_ra - np.float32(depth) - np.float32(tilt) * x_ra - np.float32(wave) * np.square(x_ra)
        scene.echo_ra += uniform(4, 14) * _ridge(line_ra, uniform(0.008, 0.02))
    for _ in range(round(uniform(0, 3))):
        pose = Pose(uniform(-0.45, 0.45), uniform(0.1, 0.95), uniform(-np.pi, np.pi), 1.0)
        u_ra, v_ra = pose.local(scene)
        kind = uniform(0, 1)
        if kind < 0.35:
            bend, half_length = np.float32(uniform(-2, 2)), uniform(0.06, 0.4)
            line_ra = _ridge(v_ra - bend * np.square(u_ra), uniform(0.008, 0.016)) * (np.abs(u_ra) < half_length)
            scene.echo_ra += line_ra * (4 + uniform(4, 18) * pose.facing(scene, 0.0, 1.0))
            scene.attenuation_ra += line_ra * uniform(0, 120)
        else:
            length = uniform(0.03, 0.11)
            spot_ra = np.hypot(u_ra / length, v_ra / (length * uniform(0.4, 1.0))) < 1
            scene.echo_ra += spot_ra * (uniform(-30, -8) if kind < 0.75 else uniform(4, 12))
            scene.attenuation_ra += spot_ra * (uniform(-25, 0) if kind < 0.75 else uniform(0, 50))


def _ridge(distance_ra: Floats, width: float) -> Floats:
    """A Gaussian profile around distance 0."""
    ridge_ra: Floats = np.exp(-np.square(distance_ra * np.float32(1 / width)))
    return ridge_ra.astype(np.float32)
