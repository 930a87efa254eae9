"""Our backbone in the layouts of others: a folder that they load."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Literal

from safetensors.torch import save
from torch import Tensor

from sonoforge_trainer.contract import ModelCard, canonical_json
from sonoforge_trainer.model import NORM_EPS
from sonoforge_trainer.storage import Storage
from sonoforge_trainer.weights.errors import WeightsError

ExportLayout = Literal["huggingface", "timm", "dinov2"]
Tensors = Mapping[str, Tensor]

_PILLOW_BICUBIC = 3
"""Number of bicubic resampling in Pillow, which image processors use."""


def export(card: ModelCard, tensors: Tensors, layout: ExportLayout, uri: str, storage: Storage) -> list[str]:
    """Write a folder at `uri` in another project's layout; returns the names of its files. Raises StorageError.

    `huggingface` loads by `from_pretrained`, `timm` by `create_model("hf-hub:…")` or `load_state_dict`, `dinov2` are
    the names of the authors. At the card's resolution features are the same; at others each project resizes the
    position table in its own way. Raises WeightsError for weights that the layout cannot hold.
    """
    if card.positions == "relative" and layout != "dinov2":
        raise WeightsError(f"found relative positions. Allowed: a table of positions, which {layout} exports have")
    named, documents = _EXPORTERS[layout](card, tensors)
    contiguous = {name: tensor.detach().float().contiguous().clone() for name, tensor in named.items()}
    files = {"model.safetensors": save(contiguous, {"format": "pt"})}
    files |= {name: (json.dumps(document, indent=2) + "\n").encode() for name, document in documents.items()}
    for name, data in files.items():
        storage.write(f"{uri}/{name}", data)
    return sorted(files)


def hugging_face(card: ModelCard, tensors: Tensors) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Names of the files on the hub, `config.json` and `preprocessor_config.json`."""
    named = dict(pair for name, tensor in tensors.items() for pair in _hugging_face_parts(name, tensor))
    registers = {"num_register_tokens": card.registers} if card.registers else {}
    config = {
        "architectures": ["Dinov2WithRegistersModel" if card.registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if card.registers else "dinov2",
        "hidden_size": card.embed_dim,
        "num_hidden_layers": card.depth,
        "num_attention_heads": card.heads,
        "mlp_ratio": 4,
        "hidden_act": "gelu",
        "layer_norm_eps": NORM_EPS,
        "image_size": card.resolution,
        "patch_size": card.patch_size,
        "num_channels": card.in_channels,
        "qkv_bias": True,
        "use_mask_token": True,
        "use_swiglu_ffn": card.ffn == "swiglu",
        "torch_dtype": "float32",
        **registers,
    }
    square = {"height": card.resolution, "width": card.resolution}
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": square,
        "resample": _PILLOW_BICUBIC,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(card.mean),
        "image_std": list(card.std),
        "do_convert_rgb": card.in_channels == 3,
    }
    return named, {"config.json": config, "preprocessor_config.json": processor}


_TOP = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "register_tokens": "embeddings.register_tokens",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_IN_BLOCK = {
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
}


def _hugging_face_parts(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    if name in _TOP:
        return [(_TOP[name], tensor)]
    _, number, rest = name.split(".", 2)
    if rest.startswith("attn.qkv."):
        kind = rest.removeprefix("attn.qkv.")
        base = f"encoder.layer.{number}.attention.attention"
        parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
        return [(f"{base}.{part}.{kind}", piece) for part, piece in parts]
    for ours, theirs in _IN_BLOCK.items():
        rest = rest.replace(ours, theirs)
    return [(f"encoder.layer.{number}.{rest}", tensor)]


_TIMM_NAMES: Mapping[str, str] = {
    "vit_tiny": "vit_tiny_patch16_224",  # there is no tiny DINOv2; the plain one takes the same arguments
    "vit_small": "vit_small_patch14{}_dinov2",
    "vit_base": "vit_base_patch14{}_dinov2",
    "vit_large": "vit_large_patch14{}_dinov2",
    "vit_giant2": "vit_giant_patch14{}_dinov2",
}
"""The architecture of timm that takes our arguments; `{}` is where it says registers."""


def timm(card: ModelCard, tensors: Tensors) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Names and `config.json` of timm's `VisionTransformer`.

    With registers timm gives positions to patches only, so the CLS row of the table moves into the CLS token. It has no
    mask token.
    """
    named = {name: tensor for name, tensor in tensors.items() if name != "mask_token"}
    if card.ffn == "swiglu":
        named = {n.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): t for n, t in named.items()}
    if card.registers:
        named["reg_token"] = named.pop("register_tokens")
        named["cls_token"] = named["cls_token"] + named["pos_embed"][:, :1]
        named["pos_embed"] = named["pos_embed"][:, 1:]
    arguments: dict[str, object] = {
        "img_size": card.resolution,
        "patch_size": card.patch_size,
        "in_chans": card.in_channels,
        "embed_dim": card.embed_dim,
        "depth": card.depth,
        "num_heads": card.heads,
        "init_values": 1e-5,
        "num_classes": 0,
        "global_pool": "token",
    }
    if card.registers:
        arguments |= {"reg_tokens": card.registers, "no_embed_class": True}
    config = {
        "architecture": _TIMM_NAMES[card.arch].format("_reg4" if card.registers else ""),
        "num_classes": 0,
        "num_features": card.embed_dim,
        "global_pool": "token",
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [card.in_channels, card.resolution, card.resolution],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": list(card.mean),
            "std": list(card.std),
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    return named, {"config.json": config}


def dinov2(card: ModelCard, tensors: Tensors) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The names of the authors, which are ours; the card says what they leave to code."""
    return dict(tensors), {"model-card.json": json.loads(canonical_json(card.document()))}


_EXPORTERS: Mapping[ExportLayout, Callable[[ModelCard, Tensors], tuple[dict[str, Tensor], dict[str, object]]]] = {
    "huggingface": hugging_face,
    "timm": timm,
    "dinov2": dinov2,
}
