"""An image's bytes to pixels.

Pillow, told to draft a JPEG as gray, leaves the colour planes out of the decoding; that is as fast as torchvision,
whose decoders are deprecated, and gives the same pixels. The interpreter lock is free while it decodes.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_FORMATS = ("JPEG", "PNG", "WEBP")


class CorruptImageError(ValueError):
    """The bytes are not an 8-bit image that can be decoded. The message tells nothing of the image."""


def decode(data: bytes | bytearray, channels: int) -> NDArray[np.uint8]:
    """Pixels [C, H, W]: gray for one channel, RGB for three. Raises CorruptImageError."""
    mode = "L" if channels == 1 else "RGB"
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.mode.startswith(("I", "F")):
                raise CorruptImageError("the image has more than 8 bits a channel")  # noqa: TRY301 - one way out
            image.draft(mode, image.size)
            # Pillow warns of palettes with transparency that go to gray or RGB at once.
            whole = image.convert("RGBA") if image.mode == "P" else image
            pixels = np.asarray(whole if whole.mode == mode else whole.convert(mode))
    except CorruptImageError:
        raise
    except Exception as error:  # noqa: BLE001 - Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error ...
        raise CorruptImageError(f"the image cannot be decoded ({type(error).__name__})") from None
    return pixels[np.newaxis] if channels == 1 else pixels.transpose(2, 0, 1)
