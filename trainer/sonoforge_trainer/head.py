"""The projection head of DINO and iBOT: from a token to scores of K prototypes (DINO, arXiv 2104.14294)."""

from __future__ import annotations

import itertools
import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from sonoforge_trainer.contract.config import HeadConfig


class Prototypes(nn.Module):
    """A weight-normed linear layer without bias: weight = g * v / |v|, row by row (arXiv 1602.07868).

    `weight_g` starts at 1 and learns, as in DINOv2. (DINO froze it.)
    """

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(count, 1))
        self.weight_v = nn.Parameter(torch.empty(count, dim).uniform_(-1 / math.sqrt(dim), 1 / math.sqrt(dim)))

    def initial_values(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Length 1; directions uniform in a cube, as torch's linear layers."""
        bound = 1 / math.sqrt(self.weight_v.shape[1])
        return {
            "weight_g": torch.ones(self.weight_g.shape),
            "weight_v": torch.empty(self.weight_v.shape).uniform_(-bound, bound, generator=generator),
        }

    def weight(self) -> Tensor:
        """The prototypes, [K, d], in the precision of the parameters."""
        length_k1: Tensor = torch.linalg.vector_norm(self.weight_v, dim=1, keepdim=True)
        return self.weight_v * (self.weight_g / length_k1)

    def forward(self, x_nd: Tensor) -> Tensor:
        """[n, d] -> [n, K]."""
        return functional.linear(x_nd, self.weight())


class Head(nn.Module):
    """MLP with exact GELU, L2 norm, prototypes.

    A fresh one has torch's own initial weights; `model.initialise` gives it those of a seed: linear layers N(0, .02)
    truncated with bias 0.

    Args:
        in_dim: Width of the backbone's tokens.
        config: Sizes.
    """

    def __init__(self, in_dim: int, config: HeadConfig) -> None:
        super().__init__()
        widths = [in_dim, *[config.hidden_dim] * (config.layers - 1), config.bottleneck_dim]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.last_layer = Prototypes(config.bottleneck_dim, config.prototypes)

    def forward(self, x_nd: Tensor) -> Tensor:
        """Logits of every prototype, [n, in_dim] -> [n, K], before any temperature."""
        x_nd = self.mlp(x_nd)
        # 1e-12 is 0 in half precision.
        eps = 1e-6 if x_nd.dtype == torch.float16 else 1e-12
        return cast(Tensor, self.last_layer(functional.normalize(x_nd, dim=-1, eps=eps)))
