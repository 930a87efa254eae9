"""Decoders from patch tokens to class logits: a linear one, and UPerNet (arXiv 1807.10221) on four blocks.

What comes in are the patch tokens of some blocks, reshaped to maps; CLS and register tokens never get here. Shape
suffixes: n images, d width of the backbone, c width of the decoder, K classes, h and w the patch grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from sonoforge_trainer.model import Features

POOL_SCALES = (1, 2, 3, 6)
"""Sides of the pooled maps of the pyramid pooling module, as the paper's."""


def decoder_blocks(depth: int) -> tuple[int, int, int, int]:
    """The blocks, counted from 0, at a third, half, two thirds and all of the depth.

    12 gives 3, 5, 7, 11 and 24 gives 7, 11, 15, 23, as ViT decoders use; below four blocks some are taken twice.
    """
    third, half, two_thirds = (max(1, round(depth * part)) - 1 for part in (1 / 3, 1 / 2, 2 / 3))
    return third, half, two_thirds, depth - 1


def token_maps(features: Sequence[Features], grid: tuple[int, int]) -> list[Tensor]:
    """Patch tokens of each block as maps [n, d, h, w]."""
    return [f.patches.transpose(1, 2).reshape(len(f.patches), -1, *grid) for f in features]


class LinearDecoder(nn.Module):
    """Batch normalisation and a 1x1 convolution on the patches of the last block, as the linear probe of DINOv2."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.classifier = nn.Conv2d(dim, classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(_bias(self.classifier))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps of which the last counts [n, d, h, w] -> logits [n, K, h, w]."""
        return cast(Tensor, self.classifier(self.norm(maps[-1])))


class UperNet(nn.Module):
    """Pyramid pooling on the deepest map, a feature pyramid over all four, and their fusion.

    All blocks of a ViT have one resolution, so a pyramid is made first: the four maps get 4, 2, 1 and 1/2 times the
    patch grid by two, one or no transposed convolutions, and a maximum over 2 x 2.
    """

    def __init__(self, dim: int, classes: int, channels: int) -> None:
        super().__init__()
        self.rescale = nn.ModuleList(
            [
                nn.Sequential(_double(dim), nn.BatchNorm2d(dim), nn.GELU(), _double(dim)),
                _double(dim),
                nn.Identity(),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
        )
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), _ConvNormAct(dim, channels, 1)) for side in POOL_SCALES
        )
        self.bottleneck = _ConvNormAct(dim + len(POOL_SCALES) * channels, channels, 3)
        self.laterals = nn.ModuleList(_ConvNormAct(dim, channels, 1) for _ in range(3))
        self.smooth = nn.ModuleList(_ConvNormAct(channels, channels, 3) for _ in range(3))
        self.fuse = _ConvNormAct(4 * channels, channels, 3)
        self.classifier = nn.Conv2d(channels, classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(_bias(self.classifier))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Four maps [n, d, h, w], shallow first -> logits [n, K, 4h, 4w]."""
        *shallow, deep = (scale(m) for scale, m in zip(self.rescale, maps, strict=True))
        pooled = [_resize(pool(deep), deep) for pool in self.pools]
        levels = [lateral(m) for lateral, m in zip(self.laterals, shallow, strict=True)]
        levels.append(self.bottleneck(torch.cat([deep, *pooled], dim=1)))
        for below in range(len(levels) - 1, 0, -1):
            levels[below - 1] = levels[below - 1] + _resize(levels[below], levels[below - 1])
        outputs = [smooth(level) for smooth, level in zip(self.smooth, levels[:-1], strict=True)]
        joined = torch.cat([_resize(level, outputs[0]) for level in (*outputs, levels[-1])], dim=1)
        return cast(Tensor, self.classifier(self.fuse(joined)))


class _ConvNormAct(nn.Sequential):
    """Convolution that keeps the size, batch normalisation, ReLU."""

    def __init__(self, inputs: int, outputs: int, side: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
        )


def _double(dim: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(dim, dim, 2, stride=2)


def _bias(layer: nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias


def _resize(level: Tensor, like: Tensor) -> Tensor:
    return functional.interpolate(level, size=like.shape[-2:], mode="bilinear", align_corners=False)
