"""The backbone's identities: packing, drop path, tokens, initial values."""

import pytest
import torch
from torch import nn

from sonoforge_trainer.contract.config import ModelConfig
from sonoforge_trainer.model import Backbone, draw_kept, initialise, swiglu_hidden


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def crops(wave):
    return [
        wave({"shape": (4, 3, 32, 32), "scale": 2.0, "phase": 0.1}),
        wave({"shape": (6, 3, 16, 16), "scale": 2.0, "phase": 0.2}),
    ]


def features_of(outputs):
    return torch.cat([torch.cat([o.cls.flatten(), o.patches.flatten()]) for o in outputs])


@pytest.mark.parametrize("registers", [0, 2])
def test_a_packed_pass_equals_one_pass_for_each_crop_size(lively, crops, registers):
    backbone = lively(registers=registers)
    mask = torch.zeros(4, 16, dtype=torch.bool)
    mask[1, 3:9] = True
    packed = backbone(crops, [mask, None])
    apart = [*backbone([crops[0]], [mask]), *backbone([crops[1]])]
    torch.testing.assert_close(features_of(packed), features_of(apart), rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_packed_pass_is_the_sum_of_separate_ones(lively, crops):
    backbone = lively(registers=2)

    def gradient(passes):
        backbone.zero_grad()
        for images in passes:
            sum(o.cls.square().mean() + o.patches.square().mean() for o in backbone(images)).backward()
        return torch.cat([p.grad.flatten() for p in backbone.parameters() if p.grad is not None])

    torch.testing.assert_close(gradient([crops]), gradient([[c] for c in crops]), rtol=1e-4, atol=1e-5)


def test_registers_are_dropped_from_the_patches(lively, crops):
    global_features, local_features = lively(registers=4)(crops)
    assert global_features.cls.shape == (4, 192)
    assert global_features.patches.shape == (4, 16, 192)
    assert local_features.patches.shape == (6, 4, 192)


def test_patches_come_in_row_major_order(wave):
    """With blocks that do nothing, a bright patch moves only its own token."""
    backbone = Backbone(ModelConfig(arch="vit_tiny", depth=1, patch_size=8, layer_scale=1e-30), 32).eval()
    initialise(backbone, 0)
    dark = torch.zeros(1, 3, 16, 40)
    bright = dark.clone()
    bright[0, :, 8:, 24:32] = 1.0
    with torch.no_grad():
        change = (backbone([bright])[0].patches - backbone([dark])[0].patches).abs().sum(-1)
    assert change.nonzero().tolist() == [[0, 1 * 5 + 3]]


def test_a_masked_patch_says_nothing_of_its_pixels(lively, crops):
    backbone = lively()
    mask = torch.zeros(4, 16, dtype=torch.bool)
    mask[:, 0] = True
    changed = crops[0].clone()
    changed[:, :, :8, :8] = 5.0
    with torch.no_grad():
        same = [features_of(backbone([images], [mask])) for images in (crops[0], changed)]
        seen = [features_of(backbone([images])) for images in (crops[0], changed)]
    torch.testing.assert_close(*same, rtol=0, atol=0)
    assert (seen[0] - seen[1]).abs().max() > 1e-2


def test_intermediate_features_end_with_those_of_the_whole_model(lively, crops):
    backbone = lively(registers=2)
    with torch.no_grad():
        last = backbone.intermediate(crops[0], 3)
        (whole,) = backbone([crops[0]])
    assert len(last) == 3
    torch.testing.assert_close(last[-1].patches, whole.patches, rtol=0, atol=0)
    torch.testing.assert_close(last[-1].cls, whole.cls, rtol=0, atol=0)
    assert not torch.allclose(last[0].cls, whole.cls)
    # Every one has gone through the final norm.
    first = (last[0].cls - backbone.norm.bias) / backbone.norm.weight
    torch.testing.assert_close(first.mean(-1), torch.zeros(4), rtol=0, atol=1e-5)


def test_too_many_intermediate_blocks_are_refused(lively, crops):
    with pytest.raises(ValueError, match="asked for the last 4 blocks of 3; ask for 1 to 3"):
        lively().intermediate(crops[0], 4)


def test_drop_path_at_rate_0_is_the_plain_pass(lively, crops):
    backbone = lively(drop_path=0.0)
    plain = features_of(backbone(crops))
    generator = seeded()
    before = generator.get_state()
    training = features_of(backbone.train()(crops, generator=generator))
    torch.testing.assert_close(training, plain, rtol=0, atol=0)
    assert torch.equal(generator.get_state(), before), "rate 0 draws nothing"


def test_drop_path_that_keeps_every_image_equals_the_plain_pass(lively, crops):
    """The subset path itself, with the whole batch as its subset: int(4 * 0.9999...) would drop one."""
    backbone = lively()
    x_td, shapes = backbone._embed(crops, None)
    (kept,) = draw_kept(shapes, 0.0, 1, seeded(), x_td.device)
    block = backbone.blocks[0]
    torch.testing.assert_close(block(x_td, shapes, kept), block(x_td, shapes), rtol=1e-5, atol=1e-5)


def test_drop_path_depends_on_the_given_generator_only(lively, crops):
    backbone = lively(drop_path=0.3).train()
    first = features_of(backbone(crops, generator=seeded(1)))
    torch.manual_seed(99)
    again = features_of(backbone(crops, generator=seeded(1)))
    other = features_of(backbone(crops, generator=seeded(2)))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.allclose(first, other)


def test_drop_path_without_a_generator_is_refused_in_training_mode(lively, crops):
    backbone = lively(drop_path=0.3)
    backbone(crops)
    with pytest.raises(ValueError, match="drop path in training mode draws from a generator"):
        backbone.train()(crops)


@pytest.mark.parametrize(
    ("images", "rate", "kept"), [(8, 0.3, 5), (10, 0.1, 9), (64, 0.1, 57), (2, 0.9, 1), (1, 0.3, 1), (4, 0.0, 4)]
)
def test_drop_path_keeps_the_same_number_of_images_in_each_step(images, rate, kept):
    for seed in range(3):
        for block in draw_kept(((images, 5),), rate, 4, seeded(seed), torch.device("cpu")):
            assert block.shapes == ((kept, 5),)
            for rows in (block.attention_rows, block.ffn_rows):
                chosen = rows.view(kept, 5)
                assert torch.equal(chosen, chosen[:, :1] + torch.arange(5)), "all tokens of an image, in order"
                assert torch.equal(chosen[:, 0] % 5, torch.zeros(kept, dtype=torch.int64))
                assert len(set(chosen[:, 0].tolist())) == kept
                assert rows.min() >= 0
                assert rows.max() < images * 5
            torch.testing.assert_close(block.scale, torch.full((kept * 5, 1), images / kept))


def test_drop_path_keeps_every_image_equally_often_and_draws_apart_for_both_layers():
    blocks = draw_kept(((10, 1),), 0.3, 2000, seeded(), torch.device("cpu"))
    for kind in ("attention_rows", "ffn_rows"):
        counts = torch.cat([getattr(block, kind) for block in blocks]).bincount(minlength=10)
        torch.testing.assert_close(counts / 2000, torch.full((10,), 0.7), rtol=0, atol=0.04)
    same = sum(set(b.attention_rows.tolist()) == set(b.ffn_rows.tolist()) for b in blocks)
    assert same < 60, "1 of 120 subsets agrees by chance"


def test_the_expectation_of_drop_path_is_the_plain_block(lively, crops):
    """Every image of a size is kept equally often, so over the cyclic shifts of one subset the mean is exact."""
    block = lively().blocks[0]
    block.ls2.gamma.data.zero_()  # attention alone: the feed-forward layer is not linear in its input
    x_td = crops[0][:, :, :4, :].reshape(12 * 4, 32).repeat(1, 6)  # 12 images of 4 tokens
    results = []
    for shift in range(12):
        (kept,) = draw_kept(((12, 4),), 0.5, 1, seeded(), x_td.device)
        rows = (kept.attention_rows + 4 * shift) % 48
        results.append(block(x_td, ((12, 4),), kept._replace(attention_rows=rows, ffn_rows=rows)))
    torch.testing.assert_close(torch.stack(results).mean(0), block(x_td, ((12, 4),)), rtol=1e-4, atol=1e-4)


def test_a_pass_works_under_bf16_autocast_and_keeps_the_residual_stream_in_fp32(lively, crops):
    backbone = lively(registers=2, drop_path=0.3).train()
    exact = features_of(backbone(crops, generator=seeded()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x_td, _ = backbone._embed(crops, None)
        outputs = backbone(crops, generator=seeded())
    assert x_td.dtype == torch.float32
    half = features_of(outputs).float()
    assert torch.nn.functional.cosine_similarity(half, exact, dim=0) > 0.999


@pytest.mark.parametrize(
    ("arch", "ffn", "millions"),
    [
        ("vit_small", "mlp", 22.06),
        ("vit_base", "mlp", 86.58),
        ("vit_large", "mlp", 304.37),
        ("vit_giant2", "swiglu", 1136.48),
    ],
)
def test_parameter_counts_are_those_of_the_published_models(arch, ffn, millions):
    """The released weights have patches of 14 and a table for 518 pixels; timm counts them without the mask token."""
    with torch.device("meta"):
        backbone = Backbone(ModelConfig(arch=arch, patch_size=14, ffn=ffn), 518)
    counted = sum(p.numel() for p in backbone.parameters()) - backbone.mask_token.numel()
    assert counted / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize(("dim", "hidden"), [(384, 1024), (768, 2048), (1024, 2736), (1536, 4096)])
def test_swiglu_is_as_wide_as_in_dinov2(dim, hidden):
    assert swiglu_hidden(dim) == hidden


def test_names_are_those_of_dinov2():
    config = ModelConfig(arch="vit_tiny", depth=1, patch_size=8, registers=2, ffn="swiglu")
    with torch.device("meta"):
        names = set(Backbone(config, 32).state_dict())
    assert names == {
        *("cls_token", "pos_embed", "register_tokens", "mask_token"),
        *("patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"),
        *(f"blocks.0.{norm}.{kind}" for norm in ("norm1", "norm2") for kind in ("weight", "bias")),
        *(f"blocks.0.attn.{part}.{kind}" for part in ("qkv", "proj") for kind in ("weight", "bias")),
        *(f"blocks.0.mlp.{part}.{kind}" for part in ("w12", "w3") for kind in ("weight", "bias")),
        *("blocks.0.ls1.gamma", "blocks.0.ls2.gamma"),
    }


def test_initial_values_are_those_of_dinov2():
    backbone = Backbone(ModelConfig(arch="vit_small", depth=2, registers=4, layer_scale=1e-5), 224)
    initialise(backbone, 7)
    state = backbone.state_dict()
    assert state["pos_embed"].std().item() == pytest.approx(0.02, rel=0.02)
    assert state["blocks.1.mlp.fc1.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert state["cls_token"].std().item() == pytest.approx(1e-6, rel=0.2)
    assert state["register_tokens"].std().item() == pytest.approx(1e-6, rel=0.1)
    bound = 768**-0.5
    assert state["patch_embed.proj.weight"].abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert state["patch_embed.proj.bias"].abs().max() <= bound
    for name in ("mask_token", "blocks.0.attn.qkv.bias", "blocks.0.mlp.fc2.bias", "norm.bias"):
        assert not state[name].any(), name
    assert (state["norm.weight"] == 1).all()
    assert (state["blocks.0.ls1.gamma"] == 1e-5).all()


def test_initial_weights_depend_on_the_seed_alone():
    config = ModelConfig(arch="vit_tiny", depth=2, patch_size=8)
    models = [Backbone(config, 32) for _ in range(3)]
    initialise(models[0], 3)
    torch.manual_seed(123)
    torch.set_num_threads(2)
    initialise(models[1], 3)
    initialise(models[2], 4)
    first, second, other = (m.state_dict() for m in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], first["blocks.1.attn.qkv.weight"])


def test_initial_weights_of_seed_0_are_these():
    """A change of them would change every run; the literal numbers notice it."""
    backbone = Backbone(ModelConfig(arch="vit_tiny", depth=1, patch_size=8), 32)
    initialise(backbone, 0)
    found = backbone.blocks[0].attn.qkv.weight[0, :3]
    torch.testing.assert_close(found, torch.tensor([0.0008259144, 0.0068958327, -0.0080001112]), rtol=1e-5, atol=1e-8)


def test_a_module_whose_initial_values_are_unknown_is_not_left_as_it_is():
    with pytest.raises(AssertionError, match=r"initial values of \['bias', 'weight'\] are not defined"):
        initialise(nn.Sequential(nn.BatchNorm1d(4)), 0)


def test_an_image_that_does_not_fit_is_refused_with_what_would(lively):
    backbone = lively()
    with pytest.raises(ValueError, match=r"1 channels and 32x30 pixels; this model takes 3 channels .* multiples of 8"):
        backbone([torch.zeros(2, 1, 32, 30)])
    with pytest.raises(ValueError, match=r"image size 100 is not a multiple of patch size 16; use 96"):
        Backbone(ModelConfig(), 100)
