"""From a training configuration to a model card, and from card and tensors back to the same backbone."""

import pytest
import torch

from sonoforge_trainer.card import backbone_from_card, model_card
from sonoforge_trainer.contract.checkpoint import ModelCard
from sonoforge_trainer.contract.config import TrainConfig
from sonoforge_trainer.contract.shards import Shard, ShardManifest, dataset_digest
from sonoforge_trainer.model import Backbone, initialise

SHARD = Shard(
    name="shard-000000.tar",
    bytes=10_240,
    sha256="sha256:" + "0" * 64,
    keys=("a", "b"),
    offsets=(512, 2048),
    lengths=(100, 100),
    clips=(0, 1),
    patients=("", ""),
)
MANIFEST = ShardManifest(
    name="phantoms",
    synthetic=True,
    samples=2,
    bytes=10_240,
    dataset_digest=dataset_digest((SHARD,)),
    shards=(SHARD,),
)
TINY = TrainConfig.resolve(
    {"model": {"depth": 2}, "data": {"shards": "file:///data/shards.json"}, "recipe": {"preset": "tiny"}}
)


@pytest.fixture
def card():
    return model_card(TINY, MANIFEST, samples=320)


@pytest.fixture
def backbone():
    backbone = Backbone(TINY.model, TINY.recipe.crops.global_size)
    initialise(backbone, 0)
    return backbone.eval()


def test_the_card_says_what_the_backbone_is_and_expects(card):
    assert card.document() == {
        "format": "sonoforge.model-card/v1",
        "arch": "vit_tiny",
        "embedDim": 192,
        "depth": 2,
        "heads": 3,
        "patchSize": 8,
        "registers": 2,
        "inChannels": 1,
        "ffn": "mlp",
        "posEmbed": "antialias",
        "layerScale": 0.1,
        "positions": "table",
        "mean": [0.1842924807],
        "std": [0.2187705424],
        "resolution": 48,
        "dataDigest": MANIFEST.dataset_digest,
        "configDigest": TINY.digest(),
        "samples": 320,
        "source": None,
        "syntheticData": True,
    }


def test_card_and_tensors_give_the_same_features(card, backbone, wave):
    tensors = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    again = backbone_from_card(ModelCard.from_json(card.to_json()), tensors)
    images = wave({"shape": (2, 1, 40, 64), "scale": 2.0, "phase": 0.0})
    with torch.no_grad():
        (expected,), (found,) = backbone([images]), again([images])
    torch.testing.assert_close(found.cls, expected.cls, rtol=0, atol=0)
    torch.testing.assert_close(found.patches, expected.patches, rtol=0, atol=0)
    assert not again.training
    assert all(parameter.requires_grad for parameter in again.parameters()), "it can be fine-tuned"


def test_the_backbone_has_its_own_copy_in_fp32(card, backbone):
    tensors = {name: tensor.bfloat16() for name, tensor in backbone.state_dict().items()}
    again = backbone_from_card(card, tensors)
    with torch.no_grad():
        again.cls_token.fill_(9.0)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}
    assert tensors["cls_token"].max() < 1


def test_tensors_that_do_not_fit_are_refused_with_every_key(card, backbone):
    tensors = dict(backbone.state_dict())
    del tensors["mask_token"], tensors["blocks.1.ls1.gamma"]
    tensors["head.weight"] = torch.zeros(3)
    tensors["pos_embed"] = torch.zeros(1, 17, 192)
    with pytest.raises(ValueError, match="not those of the model card's vit_tiny/8 at 48 px") as error:
        backbone_from_card(card, tensors)
    assert str(error.value).splitlines()[1:] == [
        "missing (2): blocks.1.ls1.gamma, mask_token",
        "unexpected (1): head.weight",
        "shapes (1): pos_embed is (1, 17, 192), not (1, 37, 192)",
    ]


def test_weights_with_registers_do_not_load_into_a_model_without(card, backbone):
    with pytest.raises(ValueError, match=r"unexpected \(1\): register_tokens"):
        backbone_from_card(card.model_copy(update={"registers": 0}), backbone.state_dict())


def test_a_long_report_is_cut(card):
    with pytest.raises(ValueError, match=r"missing \(36\): .* and 16 more") as error:
        backbone_from_card(card, {})
    assert len(str(error.value)) < 1500


def test_a_card_that_contradicts_its_architecture_is_refused(card, backbone):
    with pytest.raises(ValueError, match="vit_tiny has width 192 and 3 heads; the card was edited or is damaged"):
        backbone_from_card(card.model_copy(update={"embed_dim": 200}), backbone.state_dict())
