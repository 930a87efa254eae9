"""One source file becomes one image member or one mask member, or is refused with a reason.

What is done to each kind of file:

* baseline 8-bit JPEG, gray or colour, and 8-bit gray or RGB PNG: the compressed pixels are kept, metadata is dropped
* other JPEG (progressive, CMYK, turned by EXIF) and WebP: decoded and written as JPEG of quality 95
* everything else of one frame (TIFF, BMP, GIF, PGM, palette, 1 bit, 16 bit, alpha): decoded and written as PNG
* palettes are applied; alpha is laid over black; equal channels become gray; an EXIF orientation is applied
* more than 8 bits: see `Window`
* several frames, broken, truncated, huge or unknown files: refused
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from sonoforge_trainer.shards.containers import plain_jpeg, plain_png
from sonoforge_trainer.shards.faults import ImageError

_FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP", "PPM")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".pgm", ".ppm"})
"""File name endings that a folder source reads."""
_MAX_PIXELS = 64 * 2**20
_ORIENTATION = 0x0112
_TIFF_BITS, _TIFF_PHOTOMETRIC = 258, 262
_JPEG_QUALITY = 95
_PERCENTILES = (0.5, 99.5)


@dataclass(frozen=True)
class Window:
    """How more than 8 bits become 8: round(255 (v - low) / (high - low)), clipped.

    `depth`: 0 to the largest value that the file's depth can hold. A file that uses less than a sixteenth of it (12
    bits kept in 16) is refused, because it would come out black. `percentile`: 0.5 and 99.5 % of each image's values.
    `range`: `low` and `high` as given, the same for every image.
    """

    rule: Literal["depth", "percentile", "range"] = "depth"
    """Where 0 and 255 lie in the file's values."""
    low: float = 0.0
    """Value that becomes 0, for `range`."""
    high: float = 0.0
    """Value that becomes 255, for `range`."""

    @classmethod
    def parse(cls, text: str) -> Window:
        """`depth`, `percentile` or `LOW,HIGH`. Raises ValueError."""
        if text == "depth":
            return cls("depth")
        if text == "percentile":
            return cls("percentile")
        low, comma, high = text.partition(",")
        try:
            window = cls("range", float(low), float(high))
        except ValueError:
            comma = ""
        if not comma or not window.low < window.high:
            raise ValueError(f"found {text!r}; allowed: depth, percentile, or LOW,HIGH with LOW below HIGH")
        return window


@dataclass(frozen=True)
class MaskRule:
    """How mask files become class indices."""

    classes: tuple[str, ...] = ()
    """Names of the values 0, 1, 2 ...; the first is the background."""
    values: Mapping[int, int] = field(default_factory=dict)
    """Value in the file to class index, for values that are not indices already (255 to 1)."""


@dataclass(frozen=True)
class ImageRule:
    """How image files become members."""

    window: Window = Window()
    """How values of more than 8 bits become 8."""
    encode: Literal["keep", "jpeg"] = "keep"
    """`jpeg` writes lossless sources as JPEG of quality 95, which decodes 2.6 times as fast, too."""


@dataclass(frozen=True)
class Picture:
    """An encoded 8-bit gray or RGB image."""

    data: bytes
    """The file."""
    extension: Literal["jpg", "png"]
    """Its format."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""


def picture(data: bytes, rule: ImageRule) -> Picture:
    """Turn the bytes of a file into an image member. Raises ImageError."""
    image = _open(data)
    if image.format != "JPEG":  # a JPEG is decoded below, without its metadata; the others can hold EXIF at their end
        _load(image)
    orientation = _orientation(image)
    if orientation == 1 and image.mode in ("L", "RGB"):
        kept = _kept(image, data, rule)
        if kept is not None:
            return kept
    lossy = image.format in ("JPEG", "WEBP")
    _load(image)
    if orientation != 1 and _orientation(image) != 1:  # reading a TIFF turns it already
        image = ImageOps.exif_transpose(image)
    if _deep_colour(image, data):
        raise ImageError("16-bit colour is not supported; convert to 8-bit RGB or to 16-bit gray")
    pixels = _eight_bit(image, rule.window)
    encoded = io.BytesIO()
    if lossy or rule.encode == "jpeg":
        Image.fromarray(pixels).save(encoded, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
        extension: Literal["jpg", "png"] = "jpg"
    else:
        Image.fromarray(pixels).save(encoded, "PNG")
        extension = "png"
    return Picture(encoded.getvalue(), extension, pixels.shape[1], pixels.shape[0])


def mask(data: bytes, size: tuple[int, int], rule: MaskRule) -> bytes:
    """Turn the bytes of a mask file into a PNG of class indices of (width, height) `size`. Raises ImageError."""
    indices = mask_indices(data, rule)
    height, width = indices.shape
    if (width, height) != size:
        raise ImageError(f"the mask is {width} x {height}, but the image is {size[0]} x {size[1]}")
    return encode_mask(indices)


def mask_indices(data: bytes, rule: MaskRule) -> NDArray[np.uint8]:
    """Class indices of the bytes of a mask file, [height, width]. Raises ImageError."""
    image = _open(data)
    _load(image)
    values = np.asarray(image)
    if values.ndim == 3 and image.mode == "RGB" and (values == values[..., :1]).all():
        values = values[..., 0]
    if values.ndim != 2 or values.dtype.kind == "f":
        raise ImageError("the mask has several channels or fractions; give one channel of class numbers")
    indices = np.zeros(values.shape, np.uint8)
    unknown = []
    for value in (int(v) for v in np.unique(values)):
        index = rule.values.get(value, value)
        if 0 <= index < len(rule.classes):
            indices[values == value] = index
        else:
            unknown.append(value)
    if unknown:
        shown = ", ".join(map(str, unknown[:8])) + (" ..." if len(unknown) > 8 else "")
        raise ImageError(
            f"the mask has the value{'s' * (len(unknown) > 1)} {shown}, but there are {len(rule.classes)} mask "
            f"classes; name more with --mask-class or map values with --mask-value {unknown[0]}=1"
        )
    return indices


def encode_mask(indices: NDArray[np.uint8]) -> bytes:
    """A PNG of class indices, [height, width]."""
    encoded = io.BytesIO()
    Image.fromarray(indices).save(encoded, "PNG")
    return encoded.getvalue()


def mode_of(data: bytes) -> str:
    """Pillow's name for how a file keeps its pixels: L, RGB, RGBA, P, I;16 ... Raises ImageError."""
    return _open(data).mode


def decode(data: bytes) -> NDArray[np.uint8]:
    """Pixels of a member, [height, width] or [height, width, 3]. Raises ImageError where it does not decode."""
    image = _open(data)
    _load(image)
    return np.asarray(image)


def _open(data: bytes) -> Image.Image:
    if not data:
        raise ImageError("the file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        frames = getattr(image, "n_frames", 1)
    except UnidentifiedImageError:
        raise ImageError(f"not an image of a known kind ({', '.join(_FORMATS)}), or broken") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"more than {_MAX_PIXELS} pixels") from None
    except Exception as error:  # noqa: BLE001 - decoders of damaged files raise anything; their words may quote metadata
        raise ImageError(f"broken header ({type(error).__name__})") from None
    if image.width * image.height > _MAX_PIXELS:
        raise ImageError(f"{image.width} x {image.height} is more than {_MAX_PIXELS} pixels")
    if frames > 1:
        raise ImageError(
            f"holds {frames} frames; write each frame to a file of its own first and give them all the same clip"
        )
    return image


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except Exception as error:  # noqa: BLE001 - as above
        raise ImageError(f"truncated or broken ({type(error).__name__})") from None


def _orientation(image: Image.Image) -> int:
    try:
        orientation = int(image.getexif().get(_ORIENTATION, 1))
    except Exception as error:  # noqa: BLE001 - as above
        raise ImageError(f"broken EXIF data ({type(error).__name__}); remove it") from None
    return orientation if 1 <= orientation <= 8 else 1


def _kept(image: Image.Image, data: bytes, rule: ImageRule) -> Picture | None:
    """The compressed pixels as they are, where the file is plain and decodes."""
    extension: Literal["jpg", "png"]
    if image.format == "JPEG":
        plain, extension = plain_jpeg(data), "jpg"
    elif image.format == "PNG" and rule.encode == "keep":
        plain, extension = plain_png(data), "png"
    else:
        return None
    if plain is None:
        return None
    if image.format == "JPEG":
        _load(_open(plain))
    return Picture(plain, extension, image.width, image.height)


def _deep_colour(image: Image.Image, data: bytes) -> bool:
    """Whether the file has several channels of more than 8 bits, of which Pillow keeps the upper 8 without a word."""
    if image.mode.startswith(("I", "F")):
        return False
    if image.format == "PNG":
        return data[24] > 8  # bit depth in the header chunk
    bits = getattr(image, "tag_v2", {}).get(_TIFF_BITS, 8)
    return any(depth > 8 for depth in (bits if isinstance(bits, tuple) else (bits,)))


def _eight_bit(image: Image.Image, window: Window) -> NDArray[np.uint8]:
    mode = image.mode
    if mode in ("I", "F") or mode.startswith("I;16"):
        return _windowed(image, window)
    if mode in ("P", "PA"):
        image = image.convert("RGBA")
    elif mode == "1":
        image = image.convert("L")
    elif mode in ("CMYK", "YCbCr"):
        image = image.convert("RGB")
    elif "transparency" in image.info and mode in ("L", "RGB"):
        image = image.convert("RGBA")
    if image.mode in ("LA", "La", "RGBA", "RGBa"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB")
    if image.mode not in ("L", "RGB"):
        raise ImageError(f"pixels of the kind {image.mode} are not supported; convert to 8- or 16-bit gray or to RGB")
    pixels = np.asarray(image)
    if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]
    return np.ascontiguousarray(pixels)


def _windowed(image: Image.Image, window: Window) -> NDArray[np.uint8]:
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ImageError("has values that are not numbers")
    if window.rule == "range":
        low, high = window.low, window.high
    elif window.rule == "percentile":
        low, high = (float(v) for v in np.percentile(values, _PERCENTILES))
        high = max(high, low + 1.0) if high <= low else high
    else:
        low, high = 0.0, float(_depth(image))
        largest = int(values.max())
        if 0 < largest <= high / 16:
            raise ImageError(
                f"uses values up to {largest} of {int(high)} and would come out black; give --window 0,{largest} "
                f"or what the device uses, or --window percentile"
            )
    return np.clip(np.floor((values - low) * (255 / (high - low)) + 0.5), 0, 255).astype(np.uint8)


def _depth(image: Image.Image) -> int:
    """The largest value that the file can hold."""
    tags = getattr(image, "tag_v2", {})
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        raise ImageError("32-bit values have no natural range; give --window LOW,HIGH or --window percentile")
    if tags.get(_TIFF_PHOTOMETRIC) == 0:
        raise ImageError("black and white are swapped in this 16-bit TIFF; invert it first")
    bits = tags.get(_TIFF_BITS, 16)
    bits = bits[0] if isinstance(bits, tuple) else bits
    return int(2 ** min(int(bits), 16)) - 1
