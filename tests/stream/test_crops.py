import numpy as np
import pytest
import torch
from PIL import Image

from sonoforge_trainer.contract import AugmentConfig, CropsConfig
from sonoforge_trainer.crops import UNIFORMS, Box, MultiCrop, Source, draw_boxes
from sonoforge_trainer.draws import uniforms


def noise(channels, height, width):
    return np.random.default_rng(0).integers(0, 256, (channels, height, width), dtype=np.uint8)


def draws(crops, *key):
    return uniforms(crops * UNIFORMS, 9, "augment", *key).reshape(crops, UNIFORMS)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(480, 640), (101, 77), (16, 15), (5, 300)])
@pytest.mark.parametrize("size", [224, 98, 33])
def test_a_crop_has_the_pixels_of_torchs_antialiased_bicubic(channels, height, width, size):
    image = noise(channels, height, width)
    source = Source(image)
    for box in draw_boxes(draws(6, height), height, width, np.array([(0.05, 1.0)] * 6)):
        part = torch.from_numpy(image)[None, :, box.top : box.top + box.height, box.left : box.left + box.width]
        expected = torch.nn.functional.interpolate(part, (size, size), mode="bicubic", antialias=True)[0]
        assert np.array_equal(source.crop(box, size), expected.numpy())


def test_a_crop_is_within_a_gray_level_of_pillows():
    image = noise(1, 300, 400)
    box = Box(13, 21, 250, 333)
    pillow = Image.fromarray(image[0]).crop((21, 13, 354, 263)).resize((96, 96), Image.Resampling.BICUBIC)
    assert np.abs(Source(image).crop(box, 96)[0].astype(int) - np.asarray(pillow)).max() <= 1


def test_a_crop_of_the_whole_image_at_its_own_size_is_the_image():
    image = noise(1, 96, 96)
    assert np.array_equal(Source(image).crop(Box(0, 0, 96, 96), 96), image)


def test_boxes_have_the_scale_and_aspect_ratio_that_is_asked_for():
    scales = np.array([(0.32, 1.0)] * 4000 + [(0.05, 0.32)] * 4000)
    boxes = np.array(draw_boxes(draws(8000, 1), 480, 640, scales))
    areas, ratios = boxes[:, 2] * boxes[:, 3] / (480 * 640), boxes[:, 3] / boxes[:, 2]
    assert 0.31 < areas[:4000].min() < 0.33
    assert areas[:4000].max() > 0.95
    assert areas[4000:].min() == pytest.approx(0.05, abs=0.002)
    assert areas[4000:].max() == pytest.approx(0.32, abs=0.002)
    assert areas[4000:].mean() == pytest.approx(0.185, abs=0.005)
    assert ratios.min() == pytest.approx(3 / 4, abs=0.01)
    assert ratios.max() == pytest.approx(4 / 3, abs=0.01)
    assert np.log(ratios[4000:]).mean() == pytest.approx(0, abs=0.01)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 0] + boxes[:, 2]).max() == 480
    assert (boxes[:, 1] + boxes[:, 3]).max() == 640


def test_an_image_too_long_for_any_attempt_gets_the_largest_centred_box():
    assert draw_boxes(draws(1), 30, 300, np.array([(0.9, 1.0)])) == [Box(0, 130, 30, 40)]
    assert draw_boxes(draws(1), 300, 30, np.array([(0.9, 1.0)])) == [Box(130, 0, 40, 30)]


def crop_all(augment, image, uniforms_kd):
    globals_vchw, locals_lchw = np.empty((2, 1, 32, 32), np.uint8), np.empty((3, 1, 16, 16), np.uint8)
    crops = CropsConfig(global_size=32, local_size=16, local_count=3)
    MultiCrop(crops, augment)(image, uniforms_kd, globals_vchw, locals_lchw)
    return [*globals_vchw, *locals_lchw]


def test_flips_turn_the_crop_and_leave_its_box():
    image, numbers = noise(1, 60, 70), draws(5)
    plain, mirrored, turned = (
        crop_all(AugmentConfig(horizontal_flip=across, vertical_flip=down), image, numbers)
        for across, down in ((0, 0), (1, 0), (1, 1))
    )
    for straight, across, both in zip(plain, mirrored, turned, strict=True):
        assert np.array_equal(across, straight[:, :, ::-1])
        assert np.array_equal(both, straight[:, ::-1, ::-1])


def test_flips_are_as_frequent_as_configured():
    image = np.zeros((1, 40, 40), np.uint8)
    image[:, :20, :] += 100
    image[:, :, :20] += 100
    augment = AugmentConfig(horizontal_flip=0.5, vertical_flip=0.25)
    across = down = 0
    for index in range(300):
        first = crop_all(augment, image, draws(5, index))[0][0].astype(int)
        down += first[:8].sum() < first[-8:].sum()
        across += first[:, :8].sum() < first[:, -8:].sum()
    assert across / 300 == pytest.approx(0.5, abs=0.09)
    assert down / 300 == pytest.approx(0.25, abs=0.08)
