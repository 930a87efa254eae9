"""The backbone: a pre-norm ViT that takes crops of several sizes in one packed pass.

Architecture and names of the state dict follow DINOv2 (arXiv 2304.07193) and its registers (arXiv 2309.16588), so that
weights move in both directions by name. Shape suffixes: n images, t tokens of an image, d width, T tokens of all crops
packed, K tokens kept by drop path.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from sonoforge_trainer.contract.config import ARCHS, ModelConfig

MLP_RATIO = 4
NORM_EPS = 1e-6
INIT_STD = 0.02
TOKEN_STD = 1e-6
OFFSET = 0.1
"""Added to the target size by the `offset` position embeddings, against rounding, as the DINOv2 base models do."""

Shapes = tuple[tuple[int, int], ...]
"""(images, tokens of an image) of each crop size inside a packed tensor."""


@dataclass(frozen=True)
class Features:
    """What the backbone says of a batch of images, after the final norm. Registers are dropped."""

    cls: Tensor
    """[n, d]"""
    patches: Tensor
    """[n, N, d], row-major over the patch grid."""


class Kept(NamedTuple):
    """The images that go through one block's attention and feed-forward layer, as rows of the packed tokens."""

    shapes: Shapes
    """(kept images, tokens) of each crop size."""
    attention_rows: Tensor
    """[K] int64 rows that attention sees."""
    ffn_rows: Tensor
    """[K] int64 rows that the feed-forward layer sees."""
    scale: Tensor
    """[K, 1] images / kept images, which keeps the expectation of the residual."""


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual (arXiv 2103.17239)."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def initial_values(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Every channel starts at `initial`."""
        return {"gamma": torch.full(self.gamma.shape, self.initial)}

    def forward(self, x_td: Tensor) -> Tensor:
        """[T, d] -> [T, d]."""
        return x_td * self.gamma


class Attention(nn.Module):
    """Multi-head self-attention inside each image; linear layers see all crop sizes at once."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_td: Tensor, shapes: Shapes) -> Tensor:
        """[T, d] -> [T, d]; one attention call for each crop size."""
        outputs = []
        for (n, t), qkv in zip(shapes, self.qkv(x_td).split([n * t for n, t in shapes]), strict=True):
            q, k, v = qkv.view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            outputs.append(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n * t, -1))
        return cast(Tensor, self.proj(_pack(outputs)))


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, MLP_RATIO * dim)
        self.fc2 = nn.Linear(MLP_RATIO * dim, dim)

    def forward(self, x_td: Tensor) -> Tensor:
        """[T, d] -> [T, d]."""
        return cast(Tensor, self.fc2(functional.gelu(self.fc1(x_td))))


class SwiGlu(nn.Module):
    """Gated feed-forward layer (arXiv 2002.05202), gate and value fused in `w12`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = swiglu_hidden(dim)
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x_td: Tensor) -> Tensor:
        """[T, d] -> [T, d]."""
        gate, value = self.w12(x_td).chunk(2, dim=-1)
        return cast(Tensor, self.w3(functional.silu(gate) * value))


def swiglu_hidden(dim: int) -> int:
    """Hidden width of SwiGLU: two thirds of the MLP's, rounded up to a multiple of 8."""
    return (int(MLP_RATIO * dim * 2 / 3) + 7) // 8 * 8


class Block(nn.Module):
    """A pre-norm transformer block with LayerScale."""

    def __init__(self, dim: int, heads: int, ffn: str, layer_scale: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, heads)
        self.ls1 = LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = SwiGlu(dim) if ffn == "swiglu" else Mlp(dim)
        self.ls2 = LayerScale(dim, layer_scale)

    def forward(self, x_td: Tensor, shapes: Shapes, kept: Kept | None = None) -> Tensor:
        """[T, d] -> [T, d]. With `kept`, only these rows are computed and changed."""
        if kept is None:
            x_td = x_td + self.ls1(self.attn(self.norm1(x_td), shapes))
            return cast(Tensor, x_td + self.ls2(self.mlp(self.norm2(x_td))))
        x_kd = x_td.index_select(0, kept.attention_rows)
        residual_kd = self.ls1(self.attn(self.norm1(x_kd), kept.shapes)) * kept.scale
        x_td = x_td.index_add(0, kept.attention_rows, residual_kd.to(x_td.dtype))
        x_kd = x_td.index_select(0, kept.ffn_rows)
        residual_kd = self.ls2(self.mlp(self.norm2(x_kd))) * kept.scale
        return x_td.index_add(0, kept.ffn_rows, residual_kd.to(x_td.dtype))


class PatchEmbed(nn.Module):
    """Images to patch tokens."""

    def __init__(self, channels: int, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images_nchw: Tensor) -> Tensor:
        """[n, C, H, W] -> [n, N, d], row-major."""
        return cast(Tensor, self.proj(images_nchw)).flatten(2).transpose(1, 2)


class Backbone(nn.Module):
    """The ViT of student and teacher.

    A fresh one has torch's own initial weights; `initialise` gives it those of a seed.

    Args:
        config: Architecture, registers, channels, drop path.
        image_size: Side in pixels of the square image whose patch grid the position table has.
    """

    def __init__(self, config: ModelConfig, image_size: int) -> None:
        super().__init__()
        if image_size % config.patch_size:
            raise ValueError(
                f"image size {image_size} is not a multiple of patch size {config.patch_size}; "
                f"use {max(1, round(image_size / config.patch_size)) * config.patch_size}"
            )
        shape = ARCHS[config.arch]
        self.config = config
        self.image_size = image_size
        self.embed_dim = dim = shape.embed_dim
        self.depth = config.depth or shape.depth
        self.heads = shape.heads
        self.grid = image_size // config.patch_size
        self.patch_embed = PatchEmbed(config.in_channels, config.patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, config.registers, dim)) if config.registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.blocks = nn.ModuleList(Block(dim, self.heads, config.ffn, config.layer_scale) for _ in range(self.depth))
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def initial_values(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Position table N(0, .02) truncated, CLS and registers N(0, 1e-6), mask token 0."""
        values = {
            "cls_token": torch.empty(self.cls_token.shape).normal_(std=TOKEN_STD, generator=generator),
            "pos_embed": _trunc_normal(self.pos_embed.shape, generator),
            "mask_token": torch.zeros(self.mask_token.shape),
        }
        if self.register_tokens is not None:
            shape = self.register_tokens.shape
            values["register_tokens"] = torch.empty(shape).normal_(std=TOKEN_STD, generator=generator)
        return values

    def forward(
        self,
        crops: list[Tensor],
        masks: list[Tensor | None] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> list[Features]:
        """One packed pass over crops of several sizes; the result is that of one pass for each.

        Args:
            crops: One [n, C, H, W] for each crop size, normalised; H and W are multiples of the patch size.
            masks: For each crop size [n, N] bool, true where a patch is replaced by the mask token, or None.
            generator: Where drop path draws from, on any device. Needed in training mode where its rate is not 0.

        Returns:
            One Features for each crop size.

        Raises:
            ValueError: A crop has wrong channels or sides, or drop path lacks its generator.
        """
        x_td, shapes = self._embed(crops, masks)
        for block, kept in zip(self.blocks, self._drops(shapes, generator, x_td.device), strict=True):
            x_td = block(x_td, shapes, kept)
        return self._features(x_td, shapes)

    def intermediate(self, images: Tensor, n_last: int) -> list[Features]:
        """Features after each of the last `n_last` blocks, the final norm applied to all, in block order.

        For probes: drop path is not applied. `images` [n, C, H, W] normalised. Raises ValueError where there are
        fewer blocks.
        """
        if not 1 <= n_last <= self.depth:
            raise ValueError(f"asked for the last {n_last} blocks of {self.depth}; ask for 1 to {self.depth}")
        x_td, shapes = self._embed([images], None)
        outputs = []
        for index, block in enumerate(self.blocks):
            x_td = block(x_td, shapes)
            if index >= self.depth - n_last:
                outputs.extend(self._features(x_td, shapes))
        return outputs

    def after_blocks(
        self, images: Tensor, blocks: Sequence[int], *, generator: torch.Generator | None = None
    ) -> list[Features]:
        """Features after each of `blocks` (numbers from 0, repeats allowed), the final norm applied to all.

        For decoders that are trained with the backbone: drop path is applied in training mode, as by `forward`.
        `images` [n, C, H, W] normalised. Raises ValueError as `forward` does.
        """
        x_td, shapes = self._embed([images], None)
        found: dict[int, Features] = {}
        for index, (block, kept) in enumerate(
            zip(self.blocks, self._drops(shapes, generator, x_td.device), strict=True)
        ):
            x_td = block(x_td, shapes, kept)
            if index in blocks:
                (found[index],) = self._features(x_td, shapes)
        return [found[index] for index in blocks]

    def _drops(self, shapes: Shapes, generator: torch.Generator | None, device: torch.device) -> Sequence[Kept | None]:
        """What each block keeps: all in eval mode or at a drop-path rate of 0."""
        if not self.training or self.config.drop_path == 0:
            return [None] * self.depth
        if generator is None:
            raise ValueError("drop path in training mode draws from a generator; give one, or call eval()")
        return draw_kept(shapes, self.config.drop_path, self.depth, generator, device)

    def _embed(self, crops: list[Tensor], masks: list[Tensor | None] | None) -> tuple[Tensor, Shapes]:
        """Tokens of all crops, packed, in the order CLS, registers, patches for each image."""
        tokens = [self._tokens(*pair) for pair in zip(crops, masks or [None] * len(crops), strict=True)]
        return _pack([x_ntd.flatten(0, 1) for x_ntd in tokens]), tuple((x.shape[0], x.shape[1]) for x in tokens)

    def _tokens(self, images_nchw: Tensor, mask: Tensor | None) -> Tensor:
        n, channels, height, width = images_nchw.shape
        size, expected = self.config.patch_size, self.config.in_channels
        if channels != expected or height % size or width % size:
            raise ValueError(
                f"found crops of {channels} channels and {height}x{width} pixels; this model takes {expected} "
                f"channels and sides that are multiples of {size}"
            )
        x_ntd = self.patch_embed(images_nchw)
        if mask is not None:
            x_ntd = torch.where(mask.unsqueeze(-1), self.mask_token.to(x_ntd.dtype), x_ntd)
        x_ntd = torch.cat([self.cls_token.expand(n, -1, -1), x_ntd], dim=1)
        x_ntd = x_ntd + self.positions(height // size, width // size)
        if self.register_tokens is not None:
            # Registers have no position, so they come in after it is added.
            x_ntd = torch.cat([x_ntd[:, :1], self.register_tokens.expand(n, -1, -1), x_ntd[:, 1:]], dim=1)
        return x_ntd

    def positions(self, rows: int, columns: int) -> Tensor:
        """The position table resized to a patch grid, [1, 1 + rows * columns, d], in fp32."""
        if rows == columns == self.grid:
            return self.pos_embed
        cls, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        table = patches.reshape(1, self.grid, self.grid, -1).permute(0, 3, 1, 2).float()
        if self.config.pos_embed == "offset":
            scale = ((rows + OFFSET) / self.grid, (columns + OFFSET) / self.grid)
            table = functional.interpolate(table, scale_factor=scale, mode="bicubic")
        else:
            table = functional.interpolate(table, size=(rows, columns), mode="bicubic", antialias=True)
        assert table.shape[-2:] == (rows, columns)
        return torch.cat([cls, table.flatten(2).transpose(1, 2).to(cls.dtype)], dim=1)

    def _features(self, x_td: Tensor, shapes: Shapes) -> list[Features]:
        packed = self.norm(x_td).split([n * t for n, t in shapes])
        views = [part.view(n, t, -1) for part, (n, t) in zip(packed, shapes, strict=True)]
        return [Features(cls=x[:, 0], patches=x[:, 1 + self.config.registers :]) for x in views]


def draw_kept(shapes: Shapes, rate: float, blocks: int, generator: torch.Generator, device: torch.device) -> list[Kept]:
    """Draw which images drop path keeps, for every block of a pass.

    Of the n images of a crop size, `max(int(n * (1 - rate)), 1)` are kept: the same number in each step, so shapes are
    static; the first ones of a random permutation, drawn for attention and feed-forward layer apart. The rest skips
    the layer, which saves its compute, and the kept residuals grow by n / kept.
    """
    rows, scales, kept = [], [], []
    start = 0
    for n, t in shapes:
        k = max(int(n * (1 - rate)), 1)
        keys = torch.rand(2 * blocks, n, generator=generator, device=generator.device)
        images = keys.argsort(dim=1)[:, :k].to(device, non_blocking=True)
        rows.append((start + images.unsqueeze(-1) * t + torch.arange(t, device=device)).flatten(1))
        scales.append(torch.full((k * t, 1), n / k, device=device))
        kept.append((k, t))
        start += n * t
    rows_bk, scale, kept_shapes = torch.cat(rows, dim=1), _pack(scales), tuple(kept)
    return [Kept(kept_shapes, rows_bk[2 * b], rows_bk[2 * b + 1], scale) for b in range(blocks)]


def compile_blocks(backbone: Backbone) -> None:
    """Compile each block in place; names of the state dict stay. Shapes are static, equal blocks share the code."""
    for block in backbone.blocks:
        block.compile(dynamic=False)


@runtime_checkable
class HasInitialValues(Protocol):
    """A module that knows the initial values of its own parameters, which are not those of its children."""

    def initial_values(self, generator: torch.Generator) -> dict[str, Tensor]:
        """CPU float32 values of every own parameter, by name."""


def initialise(module: nn.Module, seed: int) -> None:
    """Give every parameter the initial value of a seed, whatever its device and the number of processes.

    Each submodule draws on the CPU from a generator of its own, seeded by the seed and the submodule's name, so two
    modules whose parts have the same names must be initialised with different seeds, or as children of one module.
    """
    with torch.no_grad():
        for name, part in module.named_modules():
            own = dict(part.named_parameters(recurse=False))
            if not own:
                continue
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            values = dict(_initial_values(part, generator))
            assert values.keys() == own.keys(), f"{name}: initial values of {sorted(own)} are not defined"
            for key, parameter in own.items():
                parameter.copy_(values[key])


def _initial_values(part: nn.Module, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Initial values of one module's own parameters: those of DINOv2."""
    match part:
        case HasInitialValues():
            yield from part.initial_values(generator).items()
        case nn.Linear():
            yield "weight", _trunc_normal(part.weight.shape, generator)
            if part.bias is not None:
                yield "bias", torch.zeros(part.bias.shape)
        case nn.Conv2d():
            bound = 1 / math.sqrt(part.weight[0].numel())
            yield "weight", torch.empty(part.weight.shape).uniform_(-bound, bound, generator=generator)
            if part.bias is not None:
                yield "bias", torch.empty(part.bias.shape).uniform_(-bound, bound, generator=generator)
        case nn.LayerNorm():
            yield "weight", torch.ones(part.weight.shape)
            yield "bias", torch.zeros(part.bias.shape)


def _trunc_normal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return nn.init.trunc_normal_(torch.empty(shape), std=INIT_STD, generator=generator)


def _pack(parts: list[Tensor]) -> Tensor:
    """Concatenate along the first dimension, without a copy where there is nothing to join."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
