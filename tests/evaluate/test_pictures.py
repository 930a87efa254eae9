"""PCA pictures."""

import io

import numpy as np
import torch
from PIL import Image

from sonoforge_trainer.evaluate.pictures import gallery_sheet, principal_colours


def planted():
    """Two images whose left and right halves differ along the first axis, top and bottom less along the second."""
    grid = np.zeros((2, 4, 4, 6))
    grid[:, :, 2:, 0] = 8
    grid[:, 2:, :, 1] = 4
    return grid.reshape(2, 16, 6) + 0.01 * np.random.default_rng(0).normal(size=(2, 16, 6))


def test_red_is_the_direction_of_most_variance_and_green_the_next():
    red, green, _ = principal_colours(planted())[0].reshape(4, 4, 3).transpose(2, 0, 1).astype(int)
    assert red[:, 2:].min() - red[:, :2].max() > 200
    assert green[2:].min() - green[:2].max() > 200


def test_the_same_features_have_the_same_colours_whatever_sign_the_decomposition_gave_them():
    """Mirroring every feature about the mean turns the signs of all components: colours are of the largest loading."""
    features = planted()
    assert (principal_colours(features) == principal_colours(features.copy())).all()
    mirrored = principal_colours(-features).astype(int)
    assert np.abs(255 - mirrored[..., 0] - principal_colours(features)[..., 0]).max() <= 1


def test_features_of_fewer_than_three_dimensions_still_make_a_picture():
    assert principal_colours(np.random.default_rng(0).normal(size=(1, 4, 2))).shape == (1, 4, 3)


def test_a_sheet_has_the_images_above_and_their_features_below():
    pictures = [torch.full((1, 30, 40), 77, dtype=torch.uint8)] * 2
    with Image.open(io.BytesIO(gallery_sheet(pictures, planted(), (4, 4)))) as sheet:
        assert sheet.size == (128 * 2 + 4, 128 * 2 + 4)
        assert sheet.getpixel((10, 10)) == (77, 77, 77)
        assert sheet.getpixel((10, 140)) != (77, 77, 77)
