"""FLOPs for MFU, against the table of the reference (analytic, checked there with torch's FlopCounter)."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sonoforge_trainer.contract.config import HeadConfig, ModelConfig, TrainConfig
from sonoforge_trainer.flops import forward_flops, head_flops, training_flops
from sonoforge_trainer.head import Head
from sonoforge_trainer.model import Backbone


def short_recipe(local_size, prototypes=65_536, **model):
    return TrainConfig.resolve(
        {
            "model": model,
            "data": {"shards": "file:///data/shards.json"},
            "recipe": {"crops": {"localSize": local_size}, "head": {"prototypes": prototypes}},
        }
    )


@pytest.mark.parametrize(
    ("arch", "patch", "local", "gigaflops"),
    [
        ("vit_small", 16, 96, 9.20),
        ("vit_small", 14, 98, 12.25),
        ("vit_base", 16, 96, 35.13),
        ("vit_base", 14, 98, 46.32),
        ("vit_large", 16, 96, 123.1),
    ],
)
def test_a_forward_pass_of_a_global_crop_costs_what_the_table_says(arch, patch, local, gigaflops):
    model = short_recipe(local, arch=arch, patchSize=patch).model
    assert forward_flops(model, 224) / 1e9 == pytest.approx(gigaflops, rel=1e-3)


@pytest.mark.parametrize(
    ("arch", "patch", "local", "drop_path", "gigaflops"),
    [
        ("vit_small", 16, 96, 0.0, 124.3),
        ("vit_small", 16, 96, 0.1, 115.0),
        ("vit_small", 16, 96, 0.3, 96.5),
        ("vit_small", 14, 98, 0.1, 153.2),
        ("vit_base", 16, 96, 0.2, 374.1),
        ("vit_base", 14, 98, 0.3, 448.6),
        ("vit_large", 16, 96, 0.0, 1538.4),
        ("vit_large", 16, 96, 0.3, 1155.5),
        ("vit_large", 14, 98, 0.3, 1534.0),
    ],
)
def test_training_costs_what_the_table_says(arch, patch, local, drop_path, gigaflops):
    training = short_recipe(local, arch=arch, patchSize=patch, dropPath=drop_path)
    assert training_flops(training) / 1e9 == pytest.approx(gigaflops, rel=2e-3)


def test_training_of_vit_giant_with_swiglu_costs_what_the_table_says():
    training = short_recipe(98, 131_072, arch="vit_giant2", patchSize=14, ffn="swiglu", dropPath=0.4)
    assert forward_flops(training.model, 224) / 1e9 == pytest.approx(598.8, rel=1e-3)
    assert training_flops(training) / 1e9 == pytest.approx(5025, rel=2e-3)


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_the_estimate_counts_what_torch_counts(ffn):
    model = ModelConfig(arch="vit_tiny", depth=2, patch_size=8, registers=3, in_channels=1, ffn=ffn)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        Backbone(model, 32).eval()([torch.empty(1, 1, 48, 48)])
    assert counter.get_total_flops() == forward_flops(model, 48)


def test_the_estimate_of_the_head_counts_what_torch_counts():
    config = HeadConfig(prototypes=64, hidden_dim=32, bottleneck_dim=16)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        Head(24, config)(torch.empty(1, 24))
    assert counter.get_total_flops() == head_flops(24, config)
