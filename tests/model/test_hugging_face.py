"""The backbone against the independent implementation in transformers, with random weights and no download."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def hugging_face_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under the names of transformers 5."""
    names = {
        "cls_token": "embeddings.cls_token",
        "mask_token": "embeddings.mask_token",
        "pos_embed": "embeddings.position_embeddings",
        "register_tokens": "embeddings.register_tokens",
        "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
        "norm.": "layernorm.",
        "blocks.": "encoder.layer.",
    }
    parts = {
        ".attn.proj.": ".attention.o_proj.",
        ".ls1.gamma": ".layer_scale1.lambda1",
        ".ls2.gamma": ".layer_scale2.lambda1",
        ".mlp.w3.": ".mlp.down_proj.",
    }
    result = {}
    for name, tensor in state.items():
        for ours, theirs in names.items():
            if name.startswith(ours):
                name = theirs + name.removeprefix(ours)
                break
        for ours, theirs in parts.items():
            name = name.replace(ours, theirs)
        if ".attn.qkv." in name:
            for key, part in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True):
                result[name.replace(".attn.qkv.", f".attention.{key}.")] = part
        elif ".mlp.w12." in name:
            for key, part in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True):
                result[name.replace(".mlp.w12.", f".mlp.{key}.")] = part
        else:
            result[name] = tensor
    return result


def counterpart(backbone, image_size=32, state=None) -> nn.Module:
    """The transformers model with the weights of ours; it resizes positions by size, with antialias if registers."""
    ours = backbone.config
    settings = {
        "hidden_size": backbone.embed_dim,
        "num_hidden_layers": backbone.depth,
        "num_attention_heads": backbone.heads,
        "mlp_ratio": 4,
        "image_size": image_size,
        "patch_size": ours.patch_size,
        "num_channels": ours.in_channels,
        "use_swiglu_ffn": ours.ffn == "swiglu",
        "layer_norm_eps": 1e-6,
    }
    if ours.registers:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=ours.registers, **settings))
    else:
        model = Dinov2Model(Dinov2Config(use_mask_token=True, **settings))
    model.load_state_dict(hugging_face_state(state or backbone.state_dict()), strict=True)
    return model.eval()


def assert_same_features(backbone, model, images, mask=None):
    registers = backbone.config.registers
    with torch.no_grad():
        (ours,) = backbone([images], [mask])
        theirs = model(images, bool_masked_pos=mask).last_hidden_state
    torch.testing.assert_close(ours.cls, theirs[:, 0], **TOLERANCE)
    torch.testing.assert_close(ours.patches, theirs[:, 1 + registers :], **TOLERANCE)


def images_of(wave, *shape):
    return wave({"shape": shape, "scale": 2.0, "phase": 0.3})


def a_mask(images, patches):
    mask = torch.zeros(images.shape[0], patches, dtype=torch.bool)
    mask[0, ::3] = True
    mask[1, 4:7] = True
    return mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("registers", [0, 4])
def test_features_at_native_resolution_equal_those_of_transformers(lively, wave, registers, ffn, channels, masked):
    backbone = lively(registers=registers, ffn=ffn, in_channels=channels)
    images = images_of(wave, 2, channels, 32, 32)
    assert_same_features(backbone, counterpart(backbone), images, a_mask(images, 16) if masked else None)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [(24, 24), (48, 48), (40, 24)])
def test_antialias_positions_equal_the_register_model_of_transformers_at_other_resolutions(lively, wave, size, masked):
    backbone = lively(registers=4, pos_embed="antialias")
    images = images_of(wave, 2, 3, *size)
    mask = a_mask(images, size[0] * size[1] // 64) if masked else None
    assert_same_features(backbone, counterpart(backbone), images, mask)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [24, 48])
def test_offset_positions_equal_a_transformers_model_whose_table_was_resized_by_hand(lively, wave, size, masked):
    """transformers resizes by size without the offset, so the reference gets a table resized as DINOv2 does."""
    backbone = lively(pos_embed="offset")
    grid = size // 8
    table = backbone.pos_embed.detach()[:, 1:].reshape(1, 4, 4, 192).permute(0, 3, 1, 2)
    factor = float(grid + 0.1) / 4
    table = functional.interpolate(table, scale_factor=(factor, factor), mode="bicubic", antialias=False)
    assert table.shape == (1, 192, grid, grid)
    table = table.permute(0, 2, 3, 1).reshape(1, grid * grid, 192)
    state = backbone.state_dict()
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], table], dim=1)
    images = images_of(wave, 2, 3, size, size)
    mask = a_mask(images, grid * grid) if masked else None
    assert_same_features(backbone, counterpart(backbone, image_size=size, state=state), images, mask)


def test_offset_and_size_conventions_differ_so_the_choice_matters(lively, wave):
    images = images_of(wave, 2, 3, 24, 24)
    offset, antialias = lively(pos_embed="offset"), lively(pos_embed="antialias")
    with torch.no_grad():
        difference = (offset([images])[0].cls - antialias([images])[0].cls).abs().max()
    assert difference > 1e-3


def test_intermediate_features_equal_the_normed_hidden_states_of_transformers(lively, wave):
    backbone = lively(registers=4)
    model = counterpart(backbone)
    images = images_of(wave, 2, 3, 32, 32)
    with torch.no_grad():
        ours = backbone.intermediate(images, 2)
        hidden = model(images, output_hidden_states=True).hidden_states
        theirs = [model.layernorm(states) for states in hidden[-2:]]
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found.cls, expected[:, 0], **TOLERANCE)
        torch.testing.assert_close(found.patches, expected[:, 5:], **TOLERANCE)
