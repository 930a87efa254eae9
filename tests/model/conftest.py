"""Shared by the model's tests: one thread, closed-form inputs, golden values, small configurations."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sonoforge_trainer.contract.config import ModelConfig
from sonoforge_trainer.model import Backbone, initialise

GOLDENS = Path(__file__).parent.parent / "goldens"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _wave(of: dict[str, Any]) -> Tensor:
    index = torch.arange(torch.Size(of["shape"]).numel(), dtype=torch.float64)
    return (of["scale"] * torch.sin(0.37 * index * index + of["phase"])).float().reshape(of["shape"])


@pytest.fixture
def wave() -> Callable[[dict[str, Any]], Tensor]:
    """Rebuild a golden's input from its formula."""
    return _wave


@pytest.fixture
def golden() -> Callable[[str], dict[str, Any]]:
    """Read a file of golden values."""
    return lambda name: json.loads((GOLDENS / f"{name}.json").read_text())


@pytest.fixture
def lively() -> Callable[..., Backbone]:
    """A small backbone in eval mode whose every parameter matters: no near-zero tokens, biases or LayerScale."""

    def build(image_size: int = 32, seed: int = 0, **model: Any) -> Backbone:
        config = ModelConfig(**{"arch": "vit_tiny", "depth": 3, "patch_size": 8, "layer_scale": 1.0, **model})
        backbone = Backbone(config, image_size)
        initialise(backbone, seed)
        with torch.no_grad():
            for number, parameter in enumerate(backbone.parameters()):
                parameter += _wave({"shape": parameter.shape, "scale": 0.1, "phase": number})
        return backbone.eval()

    return build
