"""The projection head against golden values and by its identities."""

import pytest
import torch

from sonoforge_trainer.contract.config import HeadConfig
from sonoforge_trainer.head import Head
from sonoforge_trainer.model import initialise

TINY = HeadConfig(prototypes=12, hidden_dim=16, bottleneck_dim=4)


def test_logits_equal_those_of_lightly(golden, wave):
    values = golden("head")
    sizes = dict(values["sizes"])
    head = Head(sizes.pop("in_dim"), HeadConfig(**sizes))
    head.load_state_dict({name: wave(of) for name, of in values["parameters"].items()}, strict=True)
    logits = head(wave(values["inputs"]))
    torch.testing.assert_close(logits, torch.tensor(values["logits"]), rtol=1e-5, atol=1e-5)


def test_names_are_those_of_dinov2():
    assert set(Head(8, TINY).state_dict()) == {
        *(f"mlp.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")),
        *("last_layer.weight_g", "last_layer.weight_v"),
    }


def test_a_fresh_head_answers_with_cosines(wave):
    """weight_g is 1, the input is normalised: a logit is a cosine, and it learns its own length."""
    head = Head(8, TINY)
    initialise(head, 0)
    inputs = wave({"shape": (5, 8), "scale": 3.0, "phase": 0.2})
    logits = head(inputs)
    assert logits.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(head.last_layer.weight().norm(dim=1), torch.ones(12))
    head.last_layer.weight_g.data.fill_(2.0)
    torch.testing.assert_close(head(inputs), 2 * logits)
    head(inputs).square().sum().backward()
    assert head.last_layer.weight_g.grad.abs().max() > 0


def test_initial_values_are_those_of_dinov2():
    head = Head(384, HeadConfig(prototypes=1000))
    initialise(head, 5)
    assert head.mlp[2].weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not head.mlp[4].bias.any()
    assert (head.last_layer.weight_g == 1).all()
    assert head.last_layer.weight_v.abs().max().item() == pytest.approx(1 / 16, rel=1e-3)


def test_the_shared_head_of_vit_small_has_22_35_million_parameters():
    with torch.device("meta"):
        head = Head(384, HeadConfig())
    assert sum(p.numel() for p in head.parameters()) == 22_352_128


@pytest.mark.parametrize(("layers", "names"), [(1, [0]), (2, [0, 2]), (4, [0, 2, 4, 6])])
def test_the_number_of_layers_is_a_choice(layers, names):
    head = Head(8, TINY.model_copy(update={"layers": layers}))
    assert [n for n in range(8) if f"mlp.{n}.weight" in head.state_dict()] == names
    assert head(torch.ones(2, 8)).shape == (2, 12)


def test_a_zero_vector_gives_zero_logits_also_in_half_precision():
    """The norm's eps: 1e-12 is 0 in fp16, where the head takes 1e-6."""
    for dtype in (torch.float32, torch.float16):
        head = Head(8, TINY).to(dtype)
        for layer in (0, 2, 4):
            head.mlp[layer].bias.data.zero_()
        logits = head(torch.zeros(2, 8, dtype=dtype))
        assert torch.equal(logits, torch.zeros(2, 12, dtype=dtype))
