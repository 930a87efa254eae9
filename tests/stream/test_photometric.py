import numpy as np
import pytest
import torch
from torchvision.transforms import functional as reference

from sonoforge_trainer import photometric
from sonoforge_trainer.contract import AugmentConfig
from sonoforge_trainer.draws import uniforms
from sonoforge_trainer.photometric import Photometrics


@pytest.fixture(scope="module")
def colour_crops():
    generator = torch.Generator().manual_seed(0)
    smooth = torch.rand(6, 3, 9, 11, generator=generator)
    return torch.nn.functional.interpolate(smooth, (32, 40), mode="bilinear", align_corners=False)


def per_crop(values):
    return torch.tensor(values).view(-1, 1, 1, 1)


@pytest.mark.parametrize(
    ("ours", "theirs", "factors"),
    [
        (photometric.adjust_brightness, reference.adjust_brightness, [0.6, 0.9, 1.0, 1.1, 1.4, 0.0]),
        (photometric.adjust_contrast, reference.adjust_contrast, [0.6, 0.9, 1.0, 1.1, 1.4, 0.0]),
        (photometric.adjust_saturation, reference.adjust_saturation, [0.8, 0.9, 1.0, 1.1, 1.2, 0.0]),
        (photometric.adjust_hue, reference.adjust_hue, [-0.1, -0.05, 0.0, 0.05, 0.1, 0.5]),
    ],
)
def test_each_jitter_is_torchvisions_with_a_factor_for_each_crop(colour_crops, ours, theirs, factors):
    gray_too = ours is not photometric.adjust_hue
    for crops in (colour_crops, colour_crops[:, :1])[: 1 + gray_too]:
        expected = torch.stack([theirs(crop, factor) for crop, factor in zip(crops, factors, strict=True)])
        torch.testing.assert_close(ours(crops, per_crop(factors)), expected, atol=2e-6, rtol=0)


def test_hue_leaves_gray_and_black_pixels_alone():
    crops = torch.tensor([0.0, 0.3, 1.0]).view(1, 1, 1, 3).expand(2, 3, 1, 3)
    torch.testing.assert_close(photometric.adjust_hue(crops, per_crop([0.1, -0.4])), crops)


def test_gray_is_torchvisions_luma(colour_crops):
    torch.testing.assert_close(photometric.to_gray(colour_crops), reference.rgb_to_grayscale(colour_crops))


@pytest.mark.parametrize("channels", [1, 3])
def test_blur_is_torchvisions_with_kernel_9_and_a_deviation_for_each_crop(colour_crops, channels):
    crops = colour_crops[:, :channels]
    sigmas = [0.1, 0.5, 1.0, 1.7, 2.0, 0.0]
    expected = [reference.gaussian_blur(crop, [9, 9], [s, s]) for crop, s in zip(crops[:5], sigmas, strict=False)]
    blurred = photometric.gaussian_blur(crops, torch.tensor(sigmas))
    torch.testing.assert_close(blurred[:5], torch.stack(expected), atol=1e-6, rtol=0)
    assert torch.equal(blurred[5], crops[5])


def test_solarisation_inverts_from_128_on_like_the_uint8_operation():
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 1, 1, 1)
    ours = photometric.solarize(values.float() / 255, torch.tensor([True, False]).view(-1, 1, 1, 1))
    ours_u8 = (ours * 255).round().to(torch.uint8)
    assert torch.equal(ours_u8[0], reference.solarize(values[0], 128))
    assert torch.equal(ours_u8[1], values[1])


def photometrics(count, **columns):
    values = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]).repeat(count, 1)
    names = ["brightness", "contrast", "saturation", "hue", "grayscale", "blur_sigma", "solarize"]
    for name, column in columns.items():
        values[:, names.index(name)] = torch.tensor(column)
    return Photometrics(values)


def test_without_augmentation_only_the_normalisation_is_left():
    crops = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3).repeat(2, 3, 8, 8)
    out = photometric.apply(crops, photometrics(2), (0.5, 0.0, 0.2), (0.5, 1.0, 0.1))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out[1, :, 0, :3], torch.tensor([[-1.0, -0.6, 1.0], [0.0, 0.2, 1.0], [-2.0, 0.0, 8.0]]))


def test_all_operations_together_are_torchvisions_one_after_the_other(colour_crops):
    crops = (colour_crops[:2] * 255).round().to(torch.uint8)
    columns = {
        "brightness": [1.3, 0.7],
        "contrast": [0.8, 1.2],
        "saturation": [1.1, 0.9],
        "hue": [0.07, -0.03],
        "grayscale": [0.0, 1.0],
        "blur_sigma": [1.2, 0.4],
        "solarize": [1.0, 1.0],
    }
    expected = []
    for index, crop in enumerate(crops):
        image = reference.adjust_brightness(crop.float() / 255, columns["brightness"][index])
        image = reference.adjust_contrast(image, columns["contrast"][index])
        image = reference.adjust_saturation(image, columns["saturation"][index])
        image = reference.adjust_hue(image, columns["hue"][index])
        if columns["grayscale"][index]:
            image = reference.rgb_to_grayscale(image, 3)
        image = reference.gaussian_blur(image, [9, 9], [columns["blur_sigma"][index]] * 2)
        image = reference.solarize(image, 128 / 255)
        expected.append(reference.normalize(image, [0.4, 0.5, 0.6], [0.2, 0.2, 0.3]))
    out = photometric.apply(crops, photometrics(2, **columns), (0.4, 0.5, 0.6), (0.2, 0.2, 0.3))
    torch.testing.assert_close(out, torch.stack(expected), atol=3e-5, rtol=0)


AUGMENT = AugmentConfig(jitter=0.8, grayscale=0.2, blur=(0.0, 0.9, 0.5), solarize=0.2)


@pytest.fixture(scope="module")
def drawn():
    """The parameters of 20,000 samples of two global crops and one local crop."""
    blur, solarize = AUGMENT.blur, (0.0, AUGMENT.solarize, 0.0)
    draws = uniforms(20_000 * 27, 5, "augment", 1).reshape(20_000, 3, 9)
    values = [photometric.draw(sample, AUGMENT, blur, solarize) for sample in draws]
    return Photometrics(torch.from_numpy(np.concatenate(values)))


def frequency(flags):
    return flags.view(20_000, 3).float().mean(dim=0).tolist()


def test_probabilities_are_the_ones_that_really_apply(drawn):
    """Blur on global 1 never, on global 2 in 9 of 10, on locals in 1 of 2; solarisation on global 2 only."""
    assert frequency(drawn.blur_sigma > 0) == pytest.approx([0.0, 0.9, 0.5], abs=0.011)
    assert frequency(drawn.solarize) == pytest.approx([0.0, 0.2, 0.0], abs=0.011)
    assert frequency(drawn.grayscale) == pytest.approx([0.2] * 3, abs=0.011)
    assert frequency(drawn.brightness != 1) == pytest.approx([0.8] * 3, abs=0.011)
    assert torch.equal(drawn.brightness != 1, drawn.contrast != 1)
    assert frequency(drawn.blur_sigma > 0)[0] == 0


def test_strengths_are_uniform_in_their_ranges(drawn):
    for values, low, high in (
        (drawn.brightness[drawn.brightness != 1], 0.6, 1.4),
        (drawn.contrast[drawn.contrast != 1], 0.6, 1.4),
        (drawn.saturation[drawn.saturation != 1], 0.8, 1.2),
        (drawn.hue[drawn.hue != 0], -0.1, 0.1),
        (drawn.blur_sigma[drawn.blur_sigma > 0], 0.1, 2.0),
    ):
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
        assert values.mean().item() == pytest.approx((low + high) / 2, abs=0.01 * (high - low))
