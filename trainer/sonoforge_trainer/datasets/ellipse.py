"""The ellipse through the pixels of a drawn outline."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Ellipse:
    """An ellipse in pixels."""

    x: float
    """Centre."""
    y: float
    """Centre."""
    long: float
    """Longer half axis."""
    short: float
    """Shorter half axis."""
    angle: float
    """Of the longer axis against the x axis, in radians."""

    def circumference(self) -> float:
        """Ramanujan's second approximation (1914), exact to the sixth decimal for heads."""
        h = ((self.long - self.short) / (self.long + self.short)) ** 2
        return math.pi * (self.long + self.short) * (1 + 3 * h / (10 + math.sqrt(4 - 3 * h)))

    def holds(self, x: NDArray[np.int64], y: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether points lie inside or on the line."""
        c, s = math.cos(self.angle), math.sin(self.angle)
        along = ((x - self.x) * c + (y - self.y) * s) / self.long
        across = ((y - self.y) * c - (x - self.x) * s) / self.short
        return np.asarray(along**2 + across**2 <= 1)


def fit_ellipse(x: NDArray[np.int64], y: NDArray[np.int64]) -> Ellipse | None:
    """The ellipse with the least squared algebraic distance to the points; None where no ellipse fits.

    Halir and Flusser, Numerically stable direct least squares fitting of ellipses, WSCG 1998.
    """
    if len(x) < 6:
        return None
    mx, my = float(x.mean()), float(y.mean())
    scale = float(max(x.std(), y.std())) or 1.0
    u, v = (x - mx) / scale, (y - my) / scale
    quadratic = np.stack([u * u, u * v, v * v], 1)
    linear = np.stack([u, v, np.ones_like(u)], 1)
    s1, s2, s3 = quadratic.T @ quadratic, quadratic.T @ linear, linear.T @ linear
    try:
        t = -np.linalg.solve(s3, s2.T)
    except np.linalg.LinAlgError:
        return None
    m = s1 + s2 @ t
    _, vectors = np.linalg.eig(np.stack([m[2] / 2, -m[1], m[0] / 2]))
    vectors = vectors.real
    constraint = 4 * vectors[0] * vectors[2] - vectors[1] ** 2
    good = np.flatnonzero(constraint > 0)
    if not len(good):
        return None
    a, b, c = vectors[:, good[0]]
    d, e, f = t @ vectors[:, good[0]]
    # Centre and half axes of a u^2 + b u v + c v^2 + d u + e v + f = 0.
    determinant = 4 * a * c - b * b
    x0, y0 = (b * e - 2 * c * d) / determinant, (b * d - 2 * a * e) / determinant
    level = -(a * x0 * x0 + b * x0 * y0 + c * y0 * y0 + d * x0 + e * y0 + f)
    values, axes = np.linalg.eigh(np.array([[a, b / 2], [b / 2, c]]))
    squares = level / values
    if not (squares > 0).all():
        return None
    order = np.argsort(squares)[::-1]
    half = np.sqrt(squares[order]) * scale
    direction = axes[:, order[0]]
    return Ellipse(
        float(x0 * scale + mx),
        float(y0 * scale + my),
        float(half[0]),
        float(half[1]),
        math.atan2(float(direction[1]), float(direction[0])),
    )
