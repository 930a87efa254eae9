"""Preprocessing and features: what the model card says, and nothing else."""

import pytest
import torch
from evaluation_material import backbone_of, model_card

from sonoforge_trainer.card import backbone_from_card
from sonoforge_trainer.evaluate.errors import EvaluationConfigError
from sonoforge_trainer.evaluate.features import BATCH, BackboneModel, FeaturePass, FeatureSet, PixelModel, resized

CPU = torch.device("cpu")


def images(count, channels=1, size=32):
    return torch.randint(
        0, 256, (count, channels, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def test_images_are_normalised_with_the_mean_and_deviation_of_the_card():
    """Released code of the paper tested with other statistics than it trained with."""
    card = model_card(mean=(0.5,), std=(0.25,))
    backbone = backbone_of(card)
    pooled, _ = BackboneModel(backbone, card, None, CPU)(images(2))
    with torch.no_grad():
        expected = backbone([(images(2).float() / 255 - 0.5) / 0.25])[0]
    assert torch.allclose(pooled["cls"], expected.cls, atol=1e-5)
    other, _ = BackboneModel(backbone, model_card(mean=(0.1,), std=(0.25,)), None, CPU)(images(2))
    assert not torch.allclose(other["cls"], pooled["cls"], atol=1e-3)


def test_registers_take_part_and_are_not_among_the_patches():
    """Released code of the paper built the segmentation backbone without the registers it was trained with."""
    card = model_card(registers=4)
    backbone = backbone_of(card)
    _, patches = BackboneModel(backbone, card, None, CPU)(images(1))
    assert patches.shape == (1, 16, 192)
    with torch.no_grad():
        backbone.register_tokens.normal_(generator=torch.Generator().manual_seed(1))
    _, changed = BackboneModel(backbone, card, None, CPU)(images(1))
    assert not torch.allclose(patches, changed, atol=1e-3)


def test_registers_that_the_card_does_not_name_are_refused():
    with pytest.raises(ValueError, match="register_tokens"):
        backbone_from_card(model_card(registers=0), backbone_of(model_card(registers=4)).state_dict())


def test_pooled_features_are_those_of_the_last_blocks():
    card = model_card(depth=2)
    pooled, patches = BackboneModel(backbone_of(card), card, None, CPU)(images(3))
    assert {name: tuple(values.shape) for name, values in pooled.items()} == {
        "cls": (3, 192),
        "mean_patch": (3, 192),
        "cls_blocks": (3, 384),
    }
    assert torch.equal(pooled["cls_blocks"][:, 192:], pooled["cls"])
    assert torch.allclose(pooled["mean_patch"], patches.mean(1))


def test_a_colour_model_gets_three_channels():
    card = model_card(in_channels=3, mean=(0.4, 0.4, 0.4), std=(0.2, 0.2, 0.2))
    model = BackboneModel(backbone_of(card), card, None, CPU)
    assert model.channels == 3
    assert model(images(1, channels=3))[0]["cls"].shape == (1, 192)


def test_the_resolution_is_the_cards_unless_the_evaluation_asks_for_another():
    card = model_card()
    backbone = backbone_of(card)
    assert BackboneModel(backbone, card, None, CPU).grid == (4, 4)
    assert BackboneModel(backbone, card, 48, CPU).grid == (6, 6)
    with pytest.raises(EvaluationConfigError, match="resolution 50 is not a multiple of the patch size 8; use 48"):
        BackboneModel(backbone, card, 50, CPU)


def test_an_image_is_resized_to_a_square_without_cutting_anything_off():
    image = torch.zeros(1, 40, 80, dtype=torch.uint8)
    image[:, :, 40:] = 200
    square = resized(image, 20)
    assert square.shape == (1, 20, 20)
    assert square[0, :, 2].tolist() == [0] * 20
    assert square[0, :, 17].tolist() == [200] * 20


def test_a_pass_in_batches_equals_one_by_one_and_keeps_patches_of_some_images_only():
    card = model_card()
    model = BackboneModel(backbone_of(card), card, None, CPU)
    pictures = images(BATCH + 3)
    collected = FeaturePass(model)
    for number, picture in enumerate(pictures):
        collected.add(picture, patches=number in (1, BATCH + 2))
    found = collected.finish()
    pooled, patches = model(pictures[BATCH + 2 :])
    assert torch.allclose(torch.from_numpy(found.pooled["cls"][-1:]), pooled["cls"], atol=1e-5)
    assert found.patch_rows.tolist() == [1, BATCH + 2]
    assert torch.allclose(torch.from_numpy(found.patches[1:]).float(), patches, atol=2e-3)
    again = FeatureSet.of_arrays(found.arrays())
    assert (
        again.joined(("cls", "mean_patch"), torch.arange(3).numpy())
        == found.joined(("cls", "mean_patch"), torch.arange(3).numpy())
    ).all()


def test_raw_pixels_are_the_pixels():
    picture = torch.zeros(1, 1, 128, 128, dtype=torch.uint8)
    picture[0, 0, :8, 8:16] = 255
    pooled, patches = PixelModel()(picture)
    assert pooled["pixels"].shape == (1, 1024)
    assert pooled["pixels"].sum() == 4
    assert patches[0, 1].tolist() == [1] * 64
    assert patches.sum() == 64
