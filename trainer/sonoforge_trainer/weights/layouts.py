"""Layouts: which names other projects give the tensors of a ViT, and how they become ours (those of DINOv2).

layout       told by                                who writes it
dinov2       mask_token, ls1                        the DINOv2 authors, their training checkpoints, Sonoforge
timm         ls1 without mask_token; reg_token      timm `vit_*_patch14_dinov2`, `vit_*_patch14_reg4_dinov2`
huggingface  embeddings.cls_token                   transformers `Dinov2Model`, `Dinov2WithRegistersModel`
usfm         gamma_1, q_bias                        USFM and other BEiT-like ViTs
vit          none of these                          DINO, iBOT and other ViTs without LayerScale
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sonoforge_trainer.relative import grid_of_table
from sonoforge_trainer.weights.errors import WeightsError

LayoutName = Literal["dinov2", "timm", "huggingface", "usfm", "vit"]
Tensors = Mapping[str, Tensor]

RELATIVE = "attn.relative_table"
"""Our name of a block's bias of attention by relative position."""

_ANCHORS = ("embeddings.cls_token", "cls_token")
_HEADS = re.compile(
    r"(^|\.)(head|heads|classifier|pooler|decoder|dino_head|ibot_head|mask_head|lm_head|head_dist)(\.|$)"
)
_RECOMPUTED = ("relative_position_index",)
"""Ends of names that hold no learned numbers."""


@dataclass(frozen=True)
class Translated:
    """The tensors of a file under our names."""

    layout: LayoutName
    """Whose names they had."""
    tensors: dict[str, Tensor]
    """By our names. What has no counterpart here keeps its own, and is refused later as unexpected."""
    renamed: int
    """Names that changed."""
    left_out: tuple[str, ...]
    """Names that are no part of a backbone: heads, and what is computed anew."""
    filled: tuple[str, ...]
    """Our names that the layout does not have, with a value that changes nothing."""


def translate(found: Tensors) -> Translated:
    """Give tensors our names. Raises WeightsError where they are not those of one ViT."""
    prefix = _prefix(found)
    inside = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
    outside = [name for name in found if not name.startswith(prefix)]
    left_out = [name for name in outside if _HEADS.search(name)]
    left_out += [prefix + name for name in inside if _HEADS.search(name) or name.endswith(_RECOMPUTED)]
    stray = {name: found[name] for name in outside if name not in left_out}
    kept = {name: tensor for name, tensor in inside.items() if prefix + name not in left_out}
    layout = _layout_of(kept)
    tensors = {**_TRANSLATORS[layout](kept), **stray}
    mask = tensors.get("mask_token")
    if mask is not None and mask.dim() == 3:  # BEiT's has the axis of images that CLS has
        tensors["mask_token"] = mask.flatten(0, 1)
    fills = _neutral(tensors)
    return Translated(
        layout,
        {**tensors, **fills},
        renamed=len(kept.keys() - tensors.keys()),
        left_out=tuple(sorted(left_out)),
        filled=tuple(sorted(fills)),
    )


def _prefix(found: Tensors) -> str:
    """What stands before every name of the backbone, for example `backbone.` or `dinov2.`."""
    ends = [name for name in found if name.split(".")[-1] == "cls_token"]
    teachers = [name for name in ends if "teacher" in name]
    candidates = teachers or ends
    if len(candidates) != 1:
        names = ", ".join(candidates) or f"the tensors are called {', '.join(sorted(found)[:5])}, …"
        raise WeightsError(
            f"found {len(candidates)} tensors called cls_token ({names}). Allowed: the weights of one ViT with a CLS "
            f"token, in a layout of DINOv2, timm, Hugging Face Dinov2, USFM or a plain ViT"
        )
    anchor = next(anchor for anchor in _ANCHORS if candidates[0].endswith(anchor))
    return candidates[0].removesuffix(anchor)


def _layout_of(tensors: Tensors) -> LayoutName:
    def has(part: str) -> bool:
        return any(name.endswith(part) for name in tensors)

    if "embeddings.cls_token" in tensors:
        return "huggingface"
    if has(".attn.q_bias") or has(".gamma_1"):
        return "usfm"
    if has(".ls1.gamma"):
        return "dinov2" if "mask_token" in tensors else "timm"
    return "vit"


_CHUNKED = re.compile(r"^blocks\.\d+\.(\d+)\.")


def _from_dinov2(tensors: Tensors) -> dict[str, Tensor]:
    """DINOv2 itself; a sharded training run has its blocks in chunks, `blocks.CHUNK.BLOCK.`."""
    return {_CHUNKED.sub(r"blocks.\1.", name): tensor for name, tensor in tensors.items()}


def _from_timm(tensors: Tensors) -> dict[str, Tensor]:
    """Timm fuses gate and value into `fc1`, and with registers adds the CLS row of the position table to its token."""
    named = {name.replace("reg_token", "register_tokens"): tensor for name, tensor in tensors.items()}
    for name in [name for name in named if name.endswith(".mlp.fc2.weight")]:
        block = name.removesuffix("fc2.weight")
        first = named.get(f"{block}fc1.weight")
        if first is not None and first.shape[0] == 2 * named[name].shape[1]:
            for theirs, ours in (("fc1", "w12"), ("fc2", "w3")):
                for kind in ("weight", "bias"):
                    if f"{block}{theirs}.{kind}" in named:
                        named[f"{block}{ours}.{kind}"] = named.pop(f"{block}{theirs}.{kind}")
    table = named.get("pos_embed")
    if table is not None and table.dim() == 3 and _is_square(table.shape[1]):
        named["pos_embed"] = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
    return named


def _is_square(number: int) -> bool:
    return number > 1 and math.isqrt(number) ** 2 == number


_HF_NAMES = (
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^encoder\.layer\.", "blocks."),
    (r"^layernorm\.", "norm."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.(?:weights_out|down_proj)\.", ".mlp.w3."),
)
_HF_QKV = re.compile(r"^(.*?)\.attention\.(?:attention\.)?(query|key|value|q_proj|k_proj|v_proj)\.(weight|bias)$")
_HF_GATED = re.compile(r"^(.*?)\.mlp\.(gate_proj|up_proj)\.(weight|bias)$")


def _from_hugging_face(tensors: Tensors) -> dict[str, Tensor]:
    """Names of the files on the hub, and those that transformers 5 has in memory."""
    named = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := _HF_QKV.match(name):
            parts.setdefault(f"{match[1]}.attn.qkv.{match[3]}", {})["qkv".index(match[2][0])] = tensor
        elif match := _HF_GATED.match(name):
            parts.setdefault(f"{match[1]}.mlp.w12.{match[3]}", {})["gu".index(match[2][0])] = tensor
        else:
            named[name] = tensor
    for name, pieces in parts.items():
        named[name] = torch.cat([pieces[key] for key in sorted(pieces)])
    result = {}
    for name, tensor in named.items():
        for theirs, ours in _HF_NAMES:
            name = re.sub(theirs, ours, name)
        result[name] = tensor
    return result


def _from_usfm(tensors: Tensors) -> dict[str, Tensor]:
    """A BEiT: `gamma_1` and `gamma_2` are LayerScale, keys have no bias, positions are a bias of attention.

    Pretraining shares one table of positions between the blocks; fine-tuning gives each its own copy.
    """
    named = {}
    for name, tensor in tensors.items():
        if name.endswith(".attn.q_bias"):
            block = name.removesuffix("q_bias")
            value = tensors.get(f"{block}v_bias")
            if value is None:
                raise WeightsError(f"{block}v_bias is missing beside {name}; the file is not complete")
            named[f"{block}qkv.bias"] = torch.cat([tensor, torch.zeros_like(tensor), value])
        elif not name.endswith(".attn.v_bias"):
            name = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name)
            named[name.replace("attn.relative_position_bias_table", RELATIVE)] = tensor
    shared = named.pop("rel_pos_bias.relative_position_bias_table", None)
    if shared is not None:
        named |= {f"{block}{RELATIVE}": shared for block in _blocks(named)}
    return named


def _from_vit(tensors: Tensors) -> dict[str, Tensor]:
    """A plain ViT; iBOT calls its mask token otherwise."""
    return {("mask_token" if name == "masked_embed" else name): tensor for name, tensor in tensors.items()}


_TRANSLATORS: Mapping[LayoutName, Callable[[Tensors], dict[str, Tensor]]] = {
    "dinov2": _from_dinov2,
    "timm": _from_timm,
    "huggingface": _from_hugging_face,
    "usfm": _from_usfm,
    "vit": _from_vit,
}


def _blocks(tensors: Tensors) -> set[str]:
    """What the names of each block begin with."""
    return {match[0] for name in tensors if (match := re.match(r"blocks\.\d+\.", name))}


def _neutral(tensors: Tensors) -> dict[str, Tensor]:
    """What a layout may lack, with values that change nothing.

    The mask token is 0, LayerScale 1, and a table of absolute positions 0 where there are relative ones.
    """
    fills = {}
    cls = tensors.get("cls_token")
    width = cls.shape[-1] if cls is not None else 0
    if "mask_token" not in tensors:
        fills["mask_token"] = torch.zeros(1, width)
    blocks = _blocks(tensors)
    relative = tensors.get(f"blocks.0.{RELATIVE}")
    if "pos_embed" not in tensors and relative is not None:
        fills["pos_embed"] = torch.zeros(1, 1 + grid_of_table(len(relative)) ** 2, width)
    if not any(name.endswith((".ls1.gamma", ".ls2.gamma")) for name in tensors):
        fills |= {f"{block}{scale}.gamma": torch.ones(width) for block in blocks for scale in ("ls1", "ls2")}
    return fills
