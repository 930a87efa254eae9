"""Each kind of file becomes the right 8-bit pixels, or is refused with a reason."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sonoforge_trainer.shards.containers import plain_jpeg, plain_png
from sonoforge_trainer.shards.faults import ImageError
from sonoforge_trainer.shards.images import ImageRule, MaskRule, Window, decode, mask, picture

KEEP = ImageRule()
Encoded = Callable[..., bytes]
Speckle = Callable[..., np.ndarray]


def _file(pixels: np.ndarray | Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, kind, **options)
    return file.getvalue()


def _noise(height: int = 40, width: int = 48) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width), np.uint8)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_baseline_jpeg_without_metadata_is_kept_to_the_bit(encoded: Encoded, speckle: Speckle, mode: str) -> None:
    data = encoded(Image.fromarray(speckle()).convert(mode), "JPEG", quality=90)
    assert picture(data, KEEP).data == data
    assert picture(data, ImageRule(encode="jpeg")).data == data


def test_metadata_of_a_jpeg_is_dropped_and_its_pixels_are_kept_to_the_bit(encoded: Encoded, speckle: Speckle) -> None:
    """EXIF, comment, ICC profile and bytes after the end go; the compressed data stays."""
    exif = Image.Exif()
    exif[0x010E] = "DOE^JANE"
    plain = encoded(speckle(), "JPEG", quality=90)
    data = encoded(speckle(), "JPEG", quality=90, exif=exif, comment=b"DOE^JANE", icc_profile=b"DOE^JANE" * 9)
    found = picture(data + b"DOE^JANE", KEEP)
    assert found.data == plain
    assert (found.extension, found.width, found.height) == ("jpg", 48, 40)


def test_metadata_of_a_png_is_dropped_and_its_pixels_are_kept_to_the_bit(encoded: Encoded, speckle: Speckle) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Patient", "DOE^JANE")
    assert picture(encoded(speckle(), "PNG", pnginfo=info), KEEP).data == encoded(speckle(), "PNG")


def test_a_progressive_jpeg_becomes_a_baseline_one(encoded: Encoded, speckle: Speckle) -> None:
    data = encoded(speckle(), "JPEG", quality=95, progressive=True)
    assert plain_jpeg(data) is None
    found = picture(data, KEEP)
    assert found.extension == "jpg"
    assert plain_jpeg(found.data) == found.data
    assert np.abs(decode(found.data).astype(int) - decode(data)).mean() < 3


def test_an_exif_orientation_is_applied(encoded: Encoded) -> None:
    """Orientation 6: the row on top of the file is the right column of the picture."""
    pixels = np.zeros((16, 32), np.uint8)
    pixels[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "PNG", "TIFF"):
        found = picture(encoded(pixels, kind, exif=exif), KEEP)
        assert (found.width, found.height) == (16, 32)
        shown = decode(found.data)
        assert shown[:, 12].min() > 250
        assert shown[:, 3].max() < 5


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_become_8_by_the_full_range_of_the_file(encoded: Encoded, kind: str) -> None:
    data = encoded(np.array([[0, 32768, 65535, 128, 129]], np.uint16), kind)
    found = picture(data, KEEP)
    assert found.extension == "png"
    assert decode(found.data).tolist() == [[0, 128, 255, 0, 1]]


def _png(kind: int, channels: int, depth: int) -> bytes:
    """A picture of one row of two pixels, written by hand."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = struct.pack(">IIBBBBB", 2, 1, depth, kind, 0, 0, 0)
    pixels = zlib.compress(b"\0" + bytes(2 * channels * depth // 8))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("kind", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_16_bit_colour_is_refused(kind: int, channels: int) -> None:
    """Pillow would keep the upper 8 bits, which are empty where 12 bits are kept in 16."""
    with pytest.raises(ImageError, match=r"16-bit colour is not supported"):
        picture(_png(kind, channels, 16), KEEP)
    assert decode(picture(_png(kind, channels, 8), KEEP).data).max() == 0


def test_12_bits_kept_in_16_are_refused_because_they_would_come_out_black(encoded: Encoded) -> None:
    data = encoded(np.array([[0, 2048, 4095]], np.uint16))
    with pytest.raises(ImageError, match=r"uses values up to 4095 of 65535 .* give --window 0,4095"):
        picture(data, KEEP)


def test_a_given_window_holds_for_every_image(encoded: Encoded) -> None:
    data = encoded(np.array([[0, 2048, 4095, 60000]], np.uint16))
    assert decode(picture(data, ImageRule(Window.parse("0,4095"))).data).tolist() == [[0, 128, 255, 255]]


def test_the_percentile_window_follows_each_image(encoded: Encoded) -> None:
    pixels = np.arange(1000, 2001, dtype=np.uint16).reshape(1, -1)
    found = decode(picture(encoded(pixels), ImageRule(Window.parse("percentile"))).data)[0]
    assert found[[0, 5, 500, 995, 1000]].tolist() == [0, 0, 128, 255, 255]


def test_a_constant_image_has_a_percentile_window(encoded: Encoded) -> None:
    pixels = np.full((4, 4), 700, np.uint16)
    assert decode(picture(encoded(pixels), ImageRule(Window.parse("percentile"))).data).max() == 0


@pytest.mark.parametrize("pixels", [np.ones((4, 4), np.int32), np.ones((4, 4), np.float32)])
def test_32_bit_values_need_a_window(encoded: Encoded, pixels: np.ndarray) -> None:
    with pytest.raises(ImageError, match=r"no natural range; give --window LOW,HIGH"):
        picture(encoded(pixels, "TIFF"), KEEP)
    assert decode(picture(encoded(pixels, "TIFF"), ImageRule(Window.parse("0,2"))).data).tolist() == [[128] * 4] * 4


@pytest.mark.parametrize("text", ["", "full", "1", "5,5", "9,3", "a,b", "nan,1"])
def test_a_window_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"allowed: depth, percentile, or LOW,HIGH with LOW below HIGH"):
        Window.parse(text)


def test_a_palette_is_applied_and_equal_channels_become_gray(encoded: Encoded) -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    image.putpalette([9, 9, 9, 200, 200, 200, 70, 70, 70])
    assert decode(picture(encoded(image), KEEP).data).tolist() == [[9, 200, 70]]
    image.putpalette([9, 8, 7, 200, 200, 200, 70, 70, 70])
    assert decode(picture(encoded(image), KEEP).data).tolist() == [[[9, 8, 7], [200, 200, 200], [70, 70, 70]]]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_laid_over_black(encoded: Encoded, mode: str) -> None:
    pixels = np.array([[[200, 200, 200, 255], [200, 200, 200, 128], [200, 200, 200, 0]]], np.uint8)
    found = picture(encoded(Image.fromarray(pixels).convert(mode)), KEEP)
    assert decode(found.data).tolist() == [[200, 100, 0]]


def test_a_transparent_colour_is_laid_over_black(encoded: Encoded) -> None:
    data = encoded(np.array([[10, 200]], np.uint8), transparency=200)
    assert decode(picture(data, KEEP).data).tolist() == [[10, 0]]


def test_one_bit_becomes_black_and_white(encoded: Encoded) -> None:
    assert decode(picture(encoded(np.array([[True, False]])), KEEP).data).tolist() == [[255, 0]]


def test_cmyk_becomes_rgb(encoded: Encoded) -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    found = decode(picture(encoded(image, "JPEG", quality=95), KEEP).data)
    assert found.shape == (16, 16, 3)
    assert found[8, 8, 0] > 200
    assert found[8, 8, 1:].max() < 60


def test_lossless_files_become_jpeg_where_that_is_asked_for(encoded: Encoded, speckle: Speckle) -> None:
    found = picture(encoded(speckle(), "PNG"), ImageRule(encode="jpeg"))
    assert found.extension == "jpg"
    assert np.abs(decode(found.data).astype(int) - speckle()).mean() < 3


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_several_frames_are_refused_with_what_to_do(encoded: Encoded, speckle: Speckle, kind: str) -> None:
    frames = [Image.fromarray(speckle(n)) for n in range(3)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match=r"holds 3 frames; write each frame to a file of its own first"):
        picture(data, KEEP)


def test_empty_and_unknown_files_are_refused() -> None:
    with pytest.raises(ImageError, match=r"the file is empty"):
        picture(b"", KEEP)
    with pytest.raises(ImageError, match=r"not an image of a known kind"):
        picture(b"DOE^JANE" * 100, KEEP)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "WEBP"])
def test_a_cut_file_is_refused(encoded: Encoded, speckle: Speckle, kind: str) -> None:
    data = encoded(speckle(), kind)
    with pytest.raises(ImageError, match=r"truncated or broken|broken header|not an image"):
        picture(data[: len(data) // 2], KEEP)


def test_a_png_with_a_wrong_checksum_is_refused(encoded: Encoded, speckle: Speckle) -> None:
    data = bytearray(encoded(speckle(), "PNG"))
    data[len(data) // 2] ^= 1
    with pytest.raises(ImageError, match=r"damaged: a checksum inside the PNG file is wrong|truncated or broken"):
        picture(bytes(data), KEEP)


def test_a_huge_image_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(ImageError, match=r"pixels"):
        picture(_file(Image.new("1", (9000, 9000)), "PNG"), KEEP)


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(["JPEG", "PNG", "GIF", "BMP"]), data=st.data())
def test_no_damage_gives_anything_but_a_picture_or_a_refusal(kind: str, data: st.DataObject) -> None:
    """Cut anywhere and with any byte changed, the result decodes or is an ImageError without words of the file."""
    whole = bytearray(_file(_noise(), kind))
    end = data.draw(st.integers(1, len(whole)))
    at = data.draw(st.integers(0, end - 1))
    whole[at] = data.draw(st.integers(0, 255))
    try:
        found = picture(bytes(whole[:end]), KEEP)
    except ImageError:
        return
    assert decode(found.data).shape[:2] == (found.height, found.width)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_the_container_readers_survive_any_bytes(tail: bytes) -> None:
    assert plain_jpeg(b"\xff\xd8" + tail) is None
    try:
        assert plain_png(b"\x89PNG\r\n\x1a\n" + tail) is None
    except ImageError as error:
        assert "checksum" in str(error)  # noqa: PT017 - both outcomes are right


def test_mask_values_become_class_indices(encoded: Encoded) -> None:
    rule = MaskRule(("background", "head", "femur"), {255: 1, 128: 2})
    found = mask(encoded(np.array([[0, 255, 128, 2]], np.uint8)), (4, 1), rule)
    assert decode(found).tolist() == [[0, 1, 2, 2]]
    for pixels in (np.array([[False, True]]), np.array([[0, 1]], np.uint16)):
        assert decode(mask(encoded(pixels), (2, 1), rule)).tolist() == [[0, 1]]


def test_mask_indices_of_a_palette_file_are_its_indices(encoded: Encoded) -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    image.putpalette([0, 0, 0, 255, 0, 0])
    assert decode(mask(encoded(image), (2, 1), MaskRule(("background", "head")))).tolist() == [[0, 1]]


def test_a_mask_with_unknown_values_says_which(encoded: Encoded) -> None:
    with pytest.raises(ImageError, match=r"the values 7, 8, but there are 2 mask classes; .* --mask-value 7=1"):
        mask(encoded(np.array([[0, 7, 8]], np.uint8)), (3, 1), MaskRule(("background", "head")))


def test_a_mask_of_another_size_or_in_colour_is_refused(encoded: Encoded) -> None:
    rule = MaskRule(("background", "head"))
    with pytest.raises(ImageError, match=r"the mask is 3 x 1, but the image is 4 x 1"):
        mask(encoded(np.zeros((1, 3), np.uint8)), (4, 1), rule)
    with pytest.raises(ImageError, match=r"several channels"):
        mask(encoded(np.array([[[0, 1, 0]]], np.uint8)), (1, 1), rule)
