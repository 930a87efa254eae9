"""AdamW over flat parameters against torch.optim.AdamW and the reference's table of learning-rate factors."""

import math

import pytest
import torch
from torch import nn

from sonoforge_trainer.contract.config import OptimConfig
from sonoforge_trainer.optim import AdamW, Layout, clip, flat_norm, update_rule, update_teacher
from sonoforge_trainer.schedule import ScheduleValues

FINITE = torch.tensor(True)
VALUES = ScheduleValues(
    lr=3e-3,
    last_layer_lr=0.0,
    backbone_lr=3e-3,
    weight_decay=0.3,
    teacher_momentum=0.9,
    teacher_temperature=0.04,
)


def student():
    """Parameters with the names and the kinds of a real student; sizes do not divide the alignment."""
    generator = torch.Generator().manual_seed(7)
    shapes = {
        "backbone.cls_token": (1, 1, 24),
        "backbone.patch_embed.proj.weight": (24, 1, 5, 5),
        "backbone.blocks.0.attn.qkv.weight": (72, 24),
        "backbone.blocks.0.attn.qkv.bias": (72,),
        "backbone.blocks.1.ls1.gamma": (24,),
        "backbone.norm.weight": (24,),
        "dino_head.mlp.0.weight": (37, 24),
        "dino_head.last_layer.weight_v": (61, 37),
    }
    parameters = {}
    module = nn.Module()
    for name, shape in shapes.items():
        parent = module
        *path, leaf = name.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parameters[name] = nn.Parameter(0.1 * torch.randn(shape, generator=generator))
        parent.register_parameter(leaf, parameters[name])
    return module


def layout_of(module, optim=None):
    return Layout.of(module.named_parameters(), lambda name: update_rule(name, optim or OptimConfig(), depth=2))


@pytest.mark.parametrize(
    ("name", "factor", "decays"),
    [
        ("backbone.pos_embed", 0.254187, True),
        ("backbone.cls_token", 0.254187, True),
        ("backbone.mask_token", 0.254187, True),
        ("backbone.register_tokens", 0.254187, True),
        ("backbone.patch_embed.proj.weight", 0.0508373, True),
        ("backbone.patch_embed.proj.bias", 0.0508373, False),
        ("backbone.blocks.0.attn.qkv.weight", 0.282430, True),
        ("backbone.blocks.0.norm1.weight", 0.282430, False),
        ("backbone.blocks.5.ls2.gamma", 0.478297, False),
        ("backbone.blocks.11.mlp.fc2.weight", 0.9, True),
        ("backbone.norm.weight", 1.0, False),
        ("dino_head.mlp.0.weight", 1.0, True),
        ("dino_head.mlp.0.bias", 1.0, False),
        ("ibot_head.last_layer.weight_g", 1.0, True),
        ("ibot_head.last_layer.weight_v", 1.0, True),
    ],
)
def test_factors_and_decay_are_those_of_the_reference_for_twelve_blocks(name, factor, decays):
    rule = update_rule(name, OptimConfig(), depth=12)
    assert rule.lr_factor == pytest.approx(factor, rel=1e-5)
    assert rule.decays is decays
    assert rule.last_layer is ("last_layer" in name)


def test_tokens_can_be_left_out_of_weight_decay():
    optim = OptimConfig(decay_tokens=False)
    assert not update_rule("backbone.pos_embed", optim, depth=12).decays
    assert update_rule("backbone.patch_embed.proj.weight", optim, depth=12).decays


def test_parameters_become_views_of_one_tensor_and_keep_their_values():
    module = student()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    layout = layout_of(module)
    flat = layout.adopt(module)
    assert all(torch.equal(before[name], parameter) for name, parameter in module.named_parameters())
    flat.zero_()
    assert all(not parameter.any() for parameter in module.parameters())
    assert {name: (place.start % 64, place.stop % 64) for name, place in layout.modules.items()} == {
        "backbone": (0, 0),
        "dino_head": (0, 0),
    }


def test_five_steps_equal_torch_adamw():
    ours, theirs = student(), student()
    optim = OptimConfig()
    layout = layout_of(ours)
    flat = layout.adopt(ours)
    adam = AdamW(layout, flat, optim)
    reference = torch.optim.AdamW(
        [
            {
                "params": [parameter],
                "lr": rule.lr_factor * (VALUES.last_layer_lr if rule.last_layer else VALUES.lr),
                "weight_decay": VALUES.weight_decay if rule.decays else 0.0,
            }
            for name, parameter in theirs.named_parameters()
            for rule in [update_rule(name, optim, depth=2)]
        ],
        foreach=False,
        fused=False,
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        gradients = torch.zeros(layout.size)
        views = layout.views(gradients)
        for name, parameter in theirs.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            views[name].copy_(parameter.grad)
        adam.step(gradients, VALUES, FINITE)
        reference.step()
    for (name, parameter), (_, expected) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-7, msg=name)
    assert adam.steps_g.unique().tolist() == [5.0]
    frozen = dict(student().named_parameters())["dino_head.last_layer.weight_v"]
    assert torch.equal(dict(ours.named_parameters())["dino_head.last_layer.weight_v"], frozen)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(poison):
    module = student()
    layout = layout_of(module)
    flat = layout.adopt(module)
    adam = AdamW(layout, flat, OptimConfig())
    adam.step(torch.randn(layout.size, generator=torch.Generator().manual_seed(3)), VALUES, FINITE)
    teacher = torch.randn(layout.size, generator=torch.Generator().manual_seed(4))
    before = [tensor.clone() for tensor in (flat, adam.first_moment, adam.second_moment, adam.steps_g, teacher)]

    gradients = torch.randn(layout.size, generator=torch.Generator().manual_seed(5))
    layout.views(gradients)["backbone.norm.weight"][3] = poison
    norms = clip(layout, gradients, 3.0, "module")
    finite = torch.stack(list(norms.values())).isfinite().all()
    adam.step(gradients, VALUES, finite)
    update_teacher(teacher, flat, 0.9, finite)

    assert not finite
    after = [flat, adam.first_moment, adam.second_moment, adam.steps_g, teacher]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_teacher_moves_by_one_minus_momentum():
    teacher, moved = torch.full((3,), 2.0), torch.full((3,), 4.0)
    update_teacher(teacher, moved, 0.75, FINITE)
    assert teacher.tolist() == [2.5, 2.5, 2.5]


@pytest.mark.parametrize(
    ("by", "limit", "expected"),
    [("module", 2.0, (2.0, 1.0)), ("global", 2.0, (1.9611614, 0.3922323)), ("module", 0.0, (5.0, 1.0))],
)
def test_clipping_limits_each_module_or_all_together(by, limit, expected):
    module = student()
    layout = layout_of(module)
    gradients = torch.zeros(layout.size)
    views = layout.views(gradients)
    views["backbone.norm.weight"][:2] = torch.tensor([3.0, 4.0])
    views["dino_head.mlp.0.weight"][0, 0] = 1.0
    norms = clip(layout, gradients, limit, by)
    assert {name: norm.item() for name, norm in norms.items()} == {"backbone": 5.0, "dino_head": 1.0}
    after = [torch.linalg.vector_norm(gradients[place]).item() for place in layout.modules.values()]
    assert after == pytest.approx(expected, rel=1e-6)


def test_clipping_equals_torch_for_one_module():
    parameter = nn.Parameter(torch.zeros(1000))
    parameter.grad = torch.randn(1000, generator=torch.Generator().manual_seed(2))
    layout = Layout.of([("backbone.norm.weight", parameter)], lambda name: update_rule(name, OptimConfig(), depth=2))
    gradients = torch.zeros(layout.size)
    gradients[:1000] = parameter.grad
    clip(layout, gradients, 3.0, "module")
    nn.utils.clip_grad_norm_([parameter], 3.0)
    torch.testing.assert_close(gradients[:1000], parameter.grad, rtol=1e-6, atol=0)


def test_the_norm_of_many_elements_is_exact():
    flat = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))
    assert flat_norm(flat).item() == pytest.approx(flat.double().norm().item(), rel=1e-7)
