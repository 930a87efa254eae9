"""The colours of the page, for light and dark. Every pair that meets on the page is listed, with the contrast it needs.

Contrast is that of WCAG 2.2: (L1 + 0.05) / (L2 + 0.05) of the relative luminances; level AA asks for 4.5 of text and
for 3 of lines and marks.
"""

from __future__ import annotations

from collections.abc import Iterator

SERIES = 8
"""Colours of lines in a chart; more lines use them again with another dash."""

HEAT = 10
"""Steps of the colour of a confusion matrix, from the page's background to `heat`."""

LIGHT = {
    "text": "#1d2530",
    "soft": "#55606f",
    "line": "#d5dbe3",
    "back": "#ffffff",
    "panel": "#f5f7fa",
    "link": "#0a58b8",
    "good": "#0a6f3d",
    "bad": "#b3261e",
    "heat": "#8fbdf2",
    "s0": "#0b63ce",
    "s1": "#c2410c",
    "s2": "#0a7d45",
    "s3": "#8b3fb8",
    "s4": "#b3261e",
    "s5": "#0e7490",
    "s6": "#866a00",
    "s7": "#55606f",
}
DARK = {
    "text": "#e4e9f0",
    "soft": "#a3aebc",
    "line": "#364150",
    "back": "#11161d",
    "panel": "#1a212b",
    "link": "#7db8ff",
    "good": "#4ad08b",
    "bad": "#ff8a80",
    "heat": "#1f5a9e",
    "s0": "#6cb0ff",
    "s1": "#ff9b66",
    "s2": "#4ad08b",
    "s3": "#cf93f0",
    "s4": "#ff8a80",
    "s5": "#5fd0e4",
    "s6": "#e0c04a",
    "s7": "#a3aebc",
}
TEXT_CONTRAST, MARK_CONTRAST = 4.5, 3.0


def variables(palette: dict[str, str]) -> str:
    """A palette as declarations of a style sheet, with the steps of the heat."""
    steps = {f"h{step}": mixed(palette["back"], palette["heat"], step / HEAT) for step in range(HEAT + 1)}
    return " ".join(f"--{name}: {colour};" for name, colour in (palette | steps).items())


def pairs(palette: dict[str, str]) -> Iterator[tuple[str, str, float]]:
    """Foreground, background and the least contrast of everything that meets on the page."""
    grounds = (palette["back"], palette["panel"])
    for ground in grounds:
        for name in ("text", "soft", "link", "good", "bad"):
            yield palette[name], ground, TEXT_CONTRAST
        for number in range(SERIES):
            yield palette[f"s{number}"], ground, MARK_CONTRAST
    for step in range(HEAT + 1):
        yield palette["text"], mixed(palette["back"], palette["heat"], step / HEAT), TEXT_CONTRAST


def contrast(first: str, second: str) -> float:
    """Contrast of two colours #rrggbb, 1 to 21."""
    low, high = sorted((_luminance(first), _luminance(second)))
    return (high + 0.05) / (low + 0.05)


def mixed(back: str, front: str, share: float) -> str:
    """`share` of one colour over another."""
    return "#" + "".join(
        f"{round(b + share * (f - b)):02x}" for b, f in zip(_channels(back), _channels(front), strict=True)
    )


def _channels(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def _luminance(colour: str) -> float:
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in _channels(colour)]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
