"""A backbone whose attention also has a bias by relative position, as BEiT (arXiv 2106.08254) and USFM have.

It exists to evaluate such weights. Training makes no new ones, and does not continue from them.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from sonoforge_trainer.contract.config import ModelConfig
from sonoforge_trainer.model import Attention, Backbone, Shapes

CLS_ROWS = 3
"""Rows at the end of a table: CLS to patch, patch to CLS, CLS to CLS."""


def grid_of_table(rows: int) -> int:
    """Side of the patch grid whose table has this many rows, (2 g - 1)^2 + 3. Raises ValueError for another number."""
    side = math.isqrt(max(rows - CLS_ROWS, 0))
    if side % 2 == 0 or side**2 + CLS_ROWS != rows:
        raise ValueError(f"found {rows} rows. Allowed: (2 g - 1)^2 + {CLS_ROWS} of a patch grid with side g")
    return (side + 1) // 2


def relative_bias(table_rh: Tensor, grid: int) -> Tensor:
    """The bias of attention [h, 1 + g^2, 1 + g^2] for a square grid of side `grid`, from a table [rows, h].

    Entry (i, j) is what query token i adds for key token j; token 0 is CLS. A table of another grid is resized by
    bicubic interpolation.
    """
    side, heads = 2 * grid - 1, table_rh.shape[1]
    patches_rh, cls_3h = table_rh[:-CLS_ROWS], table_rh[-CLS_ROWS:]
    own = 2 * grid_of_table(len(table_rh)) - 1
    if own != side:
        image = patches_rh.T.view(1, heads, own, own)
        resized = functional.interpolate(image, size=(side, side), mode="bicubic", align_corners=False)
        patches_rh = resized.view(heads, side**2).T
    place = torch.arange(grid, device=table_rh.device)
    rows, columns = (axis.flatten() for axis in torch.meshgrid(place, place, indexing="ij"))
    down = rows.view(-1, 1) - rows + grid - 1
    right = columns.view(-1, 1) - columns + grid - 1
    bias_hnn = table_rh.new_empty(heads, 1 + grid**2, 1 + grid**2)
    bias_hnn[:, 1:, 1:] = patches_rh[down * side + right].permute(2, 0, 1)
    bias_hnn[:, 0, 1:] = cls_3h[0].view(-1, 1)
    bias_hnn[:, 1:, 0] = cls_3h[1].view(-1, 1)
    bias_hnn[:, 0, 0] = cls_3h[2]
    return bias_hnn


class RelativeAttention(Attention):
    """Self-attention with a bias by relative position; images have square patch grids and no registers."""

    def __init__(self, dim: int, heads: int, grid: int) -> None:
        super().__init__(dim, heads)
        self.relative_table = nn.Parameter(torch.zeros((2 * grid - 1) ** 2 + CLS_ROWS, heads))

    def initial_values(self, generator: torch.Generator) -> dict[str, Tensor]:
        """No position counts more than another, as BEiT starts."""
        return {"relative_table": torch.zeros(self.relative_table.shape)}

    def forward(self, x_td: Tensor, shapes: Shapes) -> Tensor:
        """[T, d] -> [T, d]. Raises ValueError for a grid that is not square."""
        outputs = []
        for (n, t), qkv in zip(shapes, self.qkv(x_td).split([n * t for n, t in shapes]), strict=True):
            grid = math.isqrt(t - 1)
            if grid**2 != t - 1:
                raise ValueError(f"found {t - 1} patches. Allowed: a square patch grid, with relative positions")
            q, k, v = qkv.view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            bias = relative_bias(self.relative_table, grid).to(q.dtype)
            attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            outputs.append(attended.transpose(1, 2).reshape(n * t, -1))
        return cast(Tensor, self.proj(torch.cat(outputs)))


class RelativeBackbone(Backbone):
    """A backbone with `RelativeAttention` in every block.

    Args:
        config: As of `Backbone`, without registers.
        image_size: Side in pixels whose patch grid the position table has.
        table_grid: Side of the patch grid that the tables of relative positions have.
    """

    def __init__(self, config: ModelConfig, image_size: int, table_grid: int) -> None:
        if config.registers:
            raise ValueError(f"registers: found {config.registers}. Allowed: 0 with relative positions")
        super().__init__(config, image_size)
        for block in self.blocks:
            block.attn = RelativeAttention(self.embed_dim, self.heads, table_grid)
