import io

import numpy as np
import pytest
from PIL import Image

from sonoforge_trainer.decode import CorruptImageError, decode

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 50, 4), dtype=np.uint8)


def encoded(pixels, form, mode=None, **options):
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, form, **options)
    return buffer.getvalue()


def test_a_gray_png_gives_its_pixels():
    assert np.array_equal(decode(encoded(PIXELS[..., 0], "PNG"), 1), PIXELS[None, ..., 0])
    assert np.array_equal(decode(encoded(PIXELS[..., 0], "PNG"), 3), np.stack([PIXELS[..., 0]] * 3))


def test_a_colour_png_gives_its_channels():
    assert np.array_equal(decode(encoded(PIXELS[..., :3], "PNG"), 3), PIXELS[..., :3].transpose(2, 0, 1))


def test_a_gray_image_stored_as_a_colour_jpeg_is_the_same_as_stored_gray():
    gray = encoded(PIXELS[..., 0], "JPEG", quality=95)
    colour = encoded(np.stack([PIXELS[..., 0]] * 3, axis=-1), "JPEG", quality=95)
    assert np.abs(decode(colour, 1).astype(int) - decode(gray, 1)).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_other_modes_are_converted(mode, channels):
    data = encoded(PIXELS, "JPEG" if mode == "CMYK" else "PNG", mode=mode)
    assert decode(data, channels).shape == (channels, 40, 50)


JPEG, PNG = encoded(PIXELS[..., 0], "JPEG"), encoded(PIXELS[..., 0], "PNG")


@pytest.mark.parametrize(
    "data",
    [
        JPEG[: len(JPEG) // 2],
        PNG[: len(PNG) // 2],
        PNG[:300] + bytes([PNG[300] ^ 255]) + PNG[301:],
        b"",
        b"not an image",
        encoded(PIXELS[..., 0].astype(np.uint16) * 257, "PNG"),
        encoded(PIXELS[..., 0], "GIF"),
    ],
    ids=["half a JPEG", "half a PNG", "a flipped byte in a PNG", "nothing", "text", "16 bits", "another format"],
)
def test_what_cannot_be_decoded_is_one_kind_of_error(data):
    with pytest.raises(CorruptImageError):
        decode(data, 1)
