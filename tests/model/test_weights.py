"""Weights of others: every layout gives the features of the model that wrote it, and nothing is left unsaid."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import io
import re

import pytest
import torch
from safetensors.torch import save
from transformers import (
    BeitConfig,
    BeitModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from sonoforge_trainer.card import backbone_from_card
from sonoforge_trainer.contract import ContractError, ModelCard, TrainConfig
from sonoforge_trainer.model import initialise
from sonoforge_trainer.storage import IntegrityError, Storage
from sonoforge_trainer.weights.checkpoint import write_imported
from sonoforge_trainer.weights.errors import WeightsError
from sonoforge_trainer.weights.export import export
from sonoforge_trainer.weights.fit import fitted_to
from sonoforge_trainer.weights.loading import IMAGENET_MEAN, IMAGENET_STD, load_weights
from sonoforge_trainer.weights.surgery import with_input, with_resolution

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
STORAGE = Storage()


def pickled(content) -> bytes:
    data = io.BytesIO()
    torch.save(content, data)
    return data.getvalue()


def write(folder, name, data):
    (folder / name).write_bytes(data)
    return (folder / name).as_uri()


def features(backbone, images):
    with torch.no_grad():
        (found,) = backbone([images])
    return found


def assert_same(backbone, other, images):
    ours, theirs = features(backbone, images), features(other, images)
    torch.testing.assert_close(ours.cls, theirs.cls, **CLOSE)
    torch.testing.assert_close(ours.patches, theirs.patches, **CLOSE)


def card_of(backbone) -> ModelCard:
    config = backbone.config
    channels = config.in_channels
    return ModelCard(
        arch=config.arch,
        embed_dim=backbone.embed_dim,
        depth=backbone.depth,
        heads=backbone.heads,
        patch_size=config.patch_size,
        registers=config.registers,
        in_channels=channels,
        ffn=config.ffn,
        pos_embed=config.pos_embed,
        mean=IMAGENET_MEAN if channels == 3 else (0.18,),
        std=IMAGENET_STD if channels == 3 else (0.22,),
        resolution=backbone.image_size,
    )


def official(backbone):
    """As the authors publish it."""
    return dict(backbone.state_dict())


def training_checkpoint(backbone):
    """As their training code saves it: chunks of blocks, inside a module, beside heads."""
    named = {re.sub(r"^blocks\.(\d+)\.", r"blocks.0.\1.", n): t for n, t in backbone.state_dict().items()}
    named = {f"backbone.{name}": tensor for name, tensor in named.items()}
    return {"teacher": {**named, "dino_head.mlp.0.weight": torch.ones(2, 2)}, "iteration": 12}


def timm_like(backbone):
    """As timm keeps it: no mask token; gate and value in fc1; with registers no position of CLS."""
    named = dict(backbone.state_dict())
    del named["mask_token"]
    named = {n.replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2"): t for n, t in named.items()}
    if "register_tokens" in named:
        named["reg_token"] = named.pop("register_tokens")
        named["cls_token"] = named["cls_token"] + named["pos_embed"][:, :1]
        named["pos_embed"] = named["pos_embed"][:, 1:]
    return named


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize(
    ("layout", "of", "name"),
    [
        ("dinov2", official, "dinov2_pretrain.pth"),
        ("dinov2", official, "model.safetensors"),
        ("dinov2", training_checkpoint, "teacher_checkpoint.pth"),
        ("timm", timm_like, "model.safetensors"),
    ],
)
def test_a_layout_gives_the_features_of_the_model_that_it_holds(
    lively, wave, tmp_path, layout, of, name, registers, ffn
):
    source = lively(registers=registers, ffn=ffn, pos_embed="antialias" if registers else "offset")
    content = of(source)
    uri = write(tmp_path, name, pickled(content) if name.endswith(".pth") else save(content))
    weights = load_weights(uri, STORAGE)
    assert weights.translated.layout == layout
    assert (weights.card.registers, weights.card.ffn, weights.card.resolution) == (registers, ffn, 32)
    assert (weights.card.mean, weights.card.pos_embed) == (IMAGENET_MEAN, source.config.pos_embed)
    for size in (32, 48):
        assert_same(weights.backbone, source, wave({"shape": (2, 3, size, size), "scale": 2.0, "phase": 0.3}))


@pytest.mark.parametrize("memory_names", [False, True])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("registers", [0, 4])
def test_a_model_of_transformers_is_read_as_it_saves_itself(wave, tmp_path, registers, ffn, memory_names):
    """The names of its files and those that transformers 5 has in memory are both in circulation."""
    settings = {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
    settings |= {"use_swiglu_ffn": ffn == "swiglu", "layer_norm_eps": 1e-6, "layerscale_value": 0.5}
    torch.manual_seed(0)
    if registers:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=registers, **settings)).eval()
    else:
        model = Dinov2Model(Dinov2Config(**settings)).eval()
    if memory_names:
        uri = write(tmp_path, "model.safetensors", save(dict(model.state_dict())))
    else:
        model.save_pretrained(tmp_path)
        uri = (tmp_path / "model.safetensors").as_uri()
    weights = load_weights(uri, STORAGE)
    assert weights.translated.layout == "huggingface"
    images = wave({"shape": (2, 3, 32, 32), "scale": 2.0, "phase": 0.3})
    with torch.no_grad():
        expected = model(images).last_hidden_state
    found = features(weights.backbone, images)
    torch.testing.assert_close(found.cls, expected[:, 0], **CLOSE)
    torch.testing.assert_close(found.patches, expected[:, 1 + registers :], **CLOSE)


def test_a_vit_without_layer_scale_gets_one_that_changes_nothing(lively, wave, tmp_path):
    """DINO and iBOT: LayerScale of 1 is none; iBOT's mask token has its own name."""
    source = lively()
    with torch.no_grad():
        for block in source.blocks:
            block.ls1.gamma.fill_(1.0)
            block.ls2.gamma.fill_(1.0)
    named = {n: t for n, t in source.state_dict().items() if ".ls" not in n}
    named["masked_embed"] = named.pop("mask_token")
    weights = load_weights(write(tmp_path, "checkpoint_teacher.pth", pickled({"state_dict": named})), STORAGE)
    assert weights.translated.layout == "vit"
    assert len(weights.translated.filled) == 6
    assert_same(weights.backbone, source, wave({"shape": (2, 3, 32, 32), "scale": 2.0, "phase": 0.3}))


def test_every_key_that_does_not_fit_is_named(lively, tmp_path):
    named = official(lively())
    named["blocks.1.attn.qkv.weight"] = named["blocks.1.attn.qkv.weight"][:-1]
    named["blocks.0.adapter.weight"] = torch.zeros(3)
    del named["norm.bias"]
    with pytest.raises(WeightsError) as raised:
        load_weights(write(tmp_path, "weights.safetensors", save(named)), STORAGE)
    message = str(raised.value)
    assert "missing (1): norm.bias" in message
    assert "unexpected (1): blocks.0.adapter.weight" in message
    assert "shapes (1): blocks.1.attn.qkv.weight is (575, 192), not (576, 192)" in message


class Exploit:
    """A pickle that would run a command."""

    def __reduce__(self):
        return (os.system, ("touch exploited",))


@pytest.mark.parametrize("content", [{"cls_token": Exploit()}, {"model": torch.nn.Linear(2, 2)}])
def test_a_file_that_could_run_code_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    uri = write(tmp_path, "weights.pth", pickled(content))
    with pytest.raises(WeightsError, match="refused by the restricted reader"):
        load_weights(uri, STORAGE)
    assert not (tmp_path / "exploited").exists()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("weights.h5", b"x", r"this kind of file is not known. Allowed: .safetensors"),
        ("weights.safetensors", b"\x08\0\0\0\0\0\0\0{}", "not a safetensors file"),
        ("weights.pth", pickled({"epoch": 3}), "no tensors; its entries are epoch"),
        ("weights.pth", pickled([torch.ones(1)]), "found a list"),
        ("resnet.safetensors", save({"conv1.weight": torch.ones(1)}), "found 0 tensors called cls_token"),
    ],
)
def test_what_is_no_vit_is_refused_with_what_it_is(tmp_path, name, data, message):
    with pytest.raises(WeightsError, match=message):
        load_weights(write(tmp_path, name, data), STORAGE)


def test_a_file_that_is_not_the_expected_one_is_refused(lively, tmp_path):
    uri = write(tmp_path, "weights.safetensors", save(official(lively())))
    with pytest.raises(IntegrityError):
        load_weights(uri, STORAGE, sha256="sha256:" + "0" * 64)


def test_weights_of_gray_images_need_their_normalisation(lively, tmp_path):
    uri = write(tmp_path, "weights.safetensors", save(official(lively(in_channels=1))))
    with pytest.raises(WeightsError, match="found 0 means and 0 deviations for 1 channels"):
        load_weights(uri, STORAGE)
    assert load_weights(uri, STORAGE, mean=(0.18,), std=(0.22,)).card.mean == (0.18,)


def seen_by(card, images_u):
    """Images in 0..1 [n, C, H, W] as a model with this card gets them."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (card.mean, card.std))
    return (images_u - mean) / std


@pytest.mark.parametrize(
    ("channels", "mean", "std"),
    [
        (3, (0.1843,), (0.2188,)),
        (3, (0.5, 0.4, 0.3), (0.2, 0.3, 0.1)),
        (1, (0.3,), (0.4,)),
        (1, IMAGENET_MEAN, IMAGENET_STD),
    ],
)
def test_another_input_leaves_the_features_of_gray_images_as_they_were(lively, wave, channels, mean, std):
    source = lively(in_channels=channels)
    card, tensors = card_of(source), official(source)
    changed_card, changed = with_input(card, tensors, mean, std)
    assert (changed_card.in_channels, changed_card.mean, changed_card.std) == (len(mean), mean, std)
    gray = wave({"shape": (2, 1, 32, 32), "scale": 0.5, "phase": 0.3}) + 0.5
    before = features(source, seen_by(card, gray.expand(-1, channels, -1, -1)))
    after = features(
        backbone_from_card(changed_card, changed), seen_by(changed_card, gray.expand(-1, len(mean), -1, -1))
    )
    torch.testing.assert_close(after.cls, before.cls, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after.patches, before.patches, rtol=1e-4, atol=1e-4)


def test_another_normalisation_of_colour_images_changes_nothing_either(lively, wave):
    source = lively()
    card = card_of(source)
    changed_card, changed = with_input(card, official(source), (0.5, 0.4, 0.3), (0.2, 0.3, 0.1))
    images = wave({"shape": (2, 3, 32, 32), "scale": 0.5, "phase": 0.3}) + 0.5
    after = features(backbone_from_card(changed_card, changed), seen_by(changed_card, images))
    torch.testing.assert_close(after.cls, features(source, seen_by(card, images)).cls, rtol=1e-4, atol=1e-4)


def test_with_equal_deviations_the_kernel_of_one_channel_is_the_sum_of_three(lively):
    """The surgery that everybody knows is the case in which deviations do not differ."""
    source = lively()
    card = card_of(source).model_copy(update={"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)})
    _, changed = with_input(card, official(source), (0.0,), (1.0,))
    kernel = source.patch_embed.proj.weight
    torch.testing.assert_close(changed["patch_embed.proj.weight"], kernel.sum(1, keepdim=True))
    torch.testing.assert_close(changed["patch_embed.proj.bias"], source.patch_embed.proj.bias)


@pytest.mark.parametrize("pos_embed", ["offset", "antialias"])
def test_a_table_of_another_resolution_leaves_the_features_there_as_they_were(lively, wave, pos_embed):
    source = lively(pos_embed=pos_embed)
    card, tensors = with_resolution(card_of(source), official(source), 48)
    assert card.resolution == 48
    assert tensors["pos_embed"].shape == (1, 37, 192)
    assert_same(backbone_from_card(card, tensors), source, wave({"shape": (2, 3, 48, 48), "scale": 2.0, "phase": 0.3}))


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("registers", [0, 4])
def test_transformers_loads_what_is_exported_and_says_the_same(lively, wave, tmp_path, registers, channels, ffn):
    source = lively(registers=registers, in_channels=channels, ffn=ffn)
    export(card_of(source), official(source), "huggingface", tmp_path.as_uri(), STORAGE)
    kind = Dinov2WithRegistersModel if registers else Dinov2Model
    model, said = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(said.values()), said
    images = wave({"shape": (2, channels, 32, 32), "scale": 2.0, "phase": 0.3})
    with torch.no_grad():
        expected = model.eval()(images).last_hidden_state
    found = features(source, images)
    torch.testing.assert_close(expected[:, 0], found.cls, **CLOSE)
    torch.testing.assert_close(expected[:, 1 + registers :], found.patches, **CLOSE)


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("layout", ["huggingface", "timm", "dinov2"])
def test_what_is_exported_is_read_back(lively, wave, tmp_path, layout, registers, ffn):
    source = lively(registers=registers, ffn=ffn)
    export(card_of(source), official(source), layout, tmp_path.as_uri(), STORAGE)
    weights = load_weights((tmp_path / "model.safetensors").as_uri(), STORAGE)
    assert weights.translated.layout == layout
    assert_same(weights.backbone, source, wave({"shape": (2, 3, 32, 32), "scale": 2.0, "phase": 0.3}))


def test_an_imported_checkpoint_is_the_same_however_often_it_is_written(lively, tmp_path):
    source = lively()
    card = card_of(source)
    refs = [write_imported(source, card, (tmp_path / name).as_uri(), STORAGE) for name in ("a", "b")]
    assert refs[0].manifest_digest == refs[1].manifest_digest
    assert load_weights(f"{refs[0].uri}/teacher.safetensors", STORAGE).card == card


def test_weights_that_contradict_a_job_are_refused_field_by_field(lively, tmp_path):
    weights = load_weights(write(tmp_path, "weights.safetensors", save(official(lively(registers=4)))), STORAGE)
    training = TrainConfig.resolve(
        {
            "model": {"arch": "vit_tiny", "depth": 3, "patchSize": 16, "registers": 0},
            "data": {"shards": "file:///a/shards.json"},
            "recipe": {"preset": "dinov2-short"},
        }
    )
    with pytest.raises(ContractError) as raised:
        fitted_to(weights, training)
    assert str(raised.value).splitlines() == [
        "training.model.patchSize: found 16. Allowed: 8, which the weights have",
        "training.model.registers: found 0. Allowed: 4, which the weights have",
        "Change these fields, or give other weights in training.init",
    ]


def usfm_like(model):
    """A transformers BEiT under the names of USFM: fused qkv, biases of queries and values, gamma for LayerScale."""
    state = model.state_dict()
    names = {
        "embeddings.cls_token": "cls_token",
        "embeddings.mask_token": "mask_token",
        "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
        "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
        "layernorm.weight": "norm.weight",
        "layernorm.bias": "norm.bias",
    }
    named = {ours: state[theirs] for theirs, ours in names.items()}
    for number in range(2):
        theirs, block = f"layers.{number}.", f"blocks.{number}."
        parts = [state[f"{theirs}attention.{part}_proj.weight"] for part in "qkv"]
        named |= {
            f"{block}attn.qkv.weight": torch.cat(parts),
            f"{block}attn.q_bias": state[f"{theirs}attention.q_proj.bias"],
            f"{block}attn.v_bias": state[f"{theirs}attention.v_proj.bias"],
            f"{block}gamma_1": state[f"{theirs}lambda_1"],
            f"{block}gamma_2": state[f"{theirs}lambda_2"],
        }
        names = {"attention.o_proj": "attn.proj", "layernorm_before": "norm1", "layernorm_after": "norm2"}
        for part, ours in {**names, "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}.items():
            named |= {f"{block}{ours}.{kind}": state[f"{theirs}{part}.{kind}"] for kind in ("weight", "bias")}
    named["rel_pos_bias.relative_position_bias_table"] = state["shared_position_bias.relative_position_bias_table"]
    named["rel_pos_bias.relative_position_index"] = torch.zeros(17, 17, dtype=torch.int64)
    return {name: tensor.detach().clone() for name, tensor in named.items()}


def a_beit():
    torch.manual_seed(0)
    config = BeitConfig(
        hidden_size=192,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=32,
        patch_size=8,
        use_mask_token=True,
        use_absolute_position_embeddings=False,
        use_relative_position_bias=False,
        use_shared_relative_position_bias=True,
        use_mean_pooling=False,
        layer_norm_eps=1e-6,
        layer_scale_init_value=0.5,
    )
    model = BeitModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        model.shared_position_bias.relative_position_bias_table.normal_()
    return model


def test_usfm_weights_give_the_features_of_a_beit_with_relative_positions(wave, tmp_path):
    model = a_beit()
    weights = load_weights(write(tmp_path, "USFM_latest.pth", pickled(usfm_like(model))), STORAGE)
    assert weights.translated.layout == "usfm"
    assert weights.card.positions == "relative"
    assert weights.translated.left_out == ("rel_pos_bias.relative_position_index",)
    assert weights.translated.filled == ("pos_embed",)
    images = wave({"shape": (2, 3, 32, 32), "scale": 2.0, "phase": 0.3})
    with torch.no_grad():
        expected = model(images).last_hidden_state
    found = features(weights.backbone, images)
    torch.testing.assert_close(found.cls, expected[:, 0], **CLOSE)
    torch.testing.assert_close(found.patches, expected[:, 1:], **CLOSE)
    assert features(weights.backbone, images[..., :24, :24]).cls.isfinite().all()


def test_relative_positions_survive_a_checkpoint_and_are_not_trained_further(tmp_path):
    weights = load_weights(write(tmp_path, "usfm.safetensors", save(usfm_like(a_beit()))), STORAGE)
    ref = write_imported(weights.backbone, weights.card, (tmp_path / "imported").as_uri(), STORAGE)
    again = load_weights(f"{ref.uri}/teacher.safetensors", STORAGE)
    assert again.card == weights.card
    assert again.tensors.keys() == weights.tensors.keys()
    initialise(again.backbone, 0)  # as the random baseline beside it
    assert again.backbone.blocks[0].attn.relative_table.abs().max() == 0
    training = TrainConfig.resolve({"data": {"shards": "file:///a/shards.json"}})
    with pytest.raises(ContractError, match="relative positions"):
        fitted_to(weights, training)
    with pytest.raises(WeightsError, match="found relative positions"):
        export(weights.card, weights.tensors, "timm", tmp_path.as_uri(), STORAGE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda named: {n: t for n, t in named.items() if "blocks" not in n}, "blocks count from 0"),
        (lambda named: {**named, "pos_embed": torch.zeros(1, 12, 192)}, "pos_embed has 12 rows"),
        (lambda named: {**named, "patch_embed.proj.weight": torch.zeros(192, 4, 8, 8)}, "takes 4 channels"),
        (lambda named: {**named, "patch_embed.proj.weight": torch.zeros(200, 3, 8, 8)}, "tokens are 200 wide"),
        (lambda named: {**named, "patch_embed.proj.weight": torch.zeros(3)}, r"found \(3,\)"),
        (lambda named: {**named, "student.cls_token": torch.zeros(1)}, "found 2 tensors called cls_token"),
    ],
)
def test_a_vit_that_cannot_be_built_here_is_refused_with_why(lively, tmp_path, change, message):
    uri = write(tmp_path, "weights.safetensors", save(change(official(lively()))))
    with pytest.raises(WeightsError, match=message):
        load_weights(uri, STORAGE)


def test_a_table_of_relative_positions_of_no_grid_is_refused(tmp_path):
    named = usfm_like(a_beit())
    named["rel_pos_bias.relative_position_bias_table"] = torch.zeros(50, 3)
    uri = write(tmp_path, "usfm.safetensors", save(named))
    with pytest.raises(WeightsError, match="found 50 rows"):
        load_weights(uri, STORAGE)
