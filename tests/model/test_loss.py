"""DINO, iBOT and KoLeo against golden values of lightly, by hand and by identities."""

import math

import pytest
import torch
from torch import tensor

from sonoforge_trainer.loss import dino_loss, ibot_loss, koleo_loss, teacher_entropy

CLOSE = {"rel": 1e-5, "abs": 1e-5}


def centred(teacher, center, temperature):
    return torch.softmax((teacher - center) / temperature, dim=-1)


@pytest.mark.parametrize("case", [0, 1, 2])
def test_dino_loss_equals_lightly_over_two_steps_with_a_moving_centre(golden, wave, case):
    """lightly's reduction is the mean over pairs and images, as ours: the factor between them is 1."""
    values = golden("dino")
    run = values["cases"][case]
    center = 0.0
    for step in run["steps"]:
        teacher, student = wave(step["teacher"]), wave(step["student"]).requires_grad_()
        targets = centred(teacher, center, values["teacher_temperature"])
        torch.testing.assert_close(targets[0, 0], tensor(step["targets_first_row"]), rtol=1e-5, atol=1e-6)
        loss = dino_loss(list(student), list(targets), values["student_temperature"])
        loss.backward()
        assert loss.item() == pytest.approx(1.0 * step["loss"], **CLOSE)
        assert student.grad.norm().item() == pytest.approx(step["student_grad_norm"], **CLOSE)
        center = tensor(step["center_after"])


def test_dino_loss_of_2_global_and_8_local_crops_is_the_mean_of_18_terms(wave):
    """The reference's form: locals with both teachers / 18, plus twice the swapped globals / 18."""
    student = wave({"shape": (10, 3, 6), "scale": 0.5, "phase": 0.0})
    targets = torch.softmax(wave({"shape": (2, 3, 6), "scale": 9.0, "phase": 1.0}), dim=-1)
    log_p = torch.log_softmax(student / 0.1, dim=-1)

    def cross_entropy(target, log_probability):
        return -(target * log_probability).sum(-1).mean()

    local_terms = sum(cross_entropy(t, p) for p in log_p[2:] for t in targets)
    swapped = torch.cat([targets[1], targets[0]])
    global_term = cross_entropy(swapped, torch.cat([log_p[0], log_p[1]]))
    expected = local_terms / 18 + 2 * global_term / 18
    torch.testing.assert_close(dino_loss(list(student), list(targets), 0.1), expected, rtol=1e-6, atol=1e-6)


def test_dino_loss_by_hand():
    """Student (0, log 3) at temperature 1 says (1/4, 3/4); view 1 meets target 2 and view 2 meets target 1."""
    student = [tensor([[0.0, math.log(3)]]), tensor([[0.0, 0.0]])]
    targets = [tensor([[1.0, 0.0]]), tensor([[0.5, 0.5]])]
    expected = (0.5 * math.log(4) + 0.5 * math.log(4 / 3) + math.log(2)) / 2
    assert dino_loss(student, targets, 1.0).item() == pytest.approx(expected, abs=1e-6)


def test_dino_loss_with_one_hot_targets_is_plain_classification(wave):
    """The limit of a cold teacher."""
    logits = wave({"shape": (5, 7), "scale": 2.0, "phase": 0.3})
    labels = tensor([0, 3, 6, 2, 2])
    one_hot = torch.nn.functional.one_hot(labels, 7).float()
    found = dino_loss([torch.zeros(5, 7), logits], [one_hot], 0.5)
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(logits / 0.5, labels))


def test_a_student_that_says_what_the_teacher_says_has_the_loss_of_its_entropy():
    target = tensor([[0.1, 0.2, 0.7]])
    loss = dino_loss([0.1 * target.log()] * 2, [target, target], 0.1)
    torch.testing.assert_close(loss, teacher_entropy(target))


@pytest.mark.parametrize(("crops", "views"), [(1, 1), (0, 0), (2, 0)])
def test_dino_loss_without_any_pair_is_refused(crops, views):
    with pytest.raises(ValueError, match="leaves no pair to compare"):
        dino_loss([torch.zeros(1, 2)] * crops, [torch.full((1, 2), 0.5)] * views, 0.1)


def test_ibot_loss_equals_lightly_over_two_steps_with_a_moving_centre(golden, wave):
    values = golden("ibot")
    weights = tensor([1 / len(crop) for crop in values["masked_patches"] for _ in crop])
    center = 0.0
    for step in values["steps"]:
        student = wave(step["student"]).requires_grad_()
        targets = centred(wave(step["teacher"]), center, values["teacher_temperature"])
        loss = ibot_loss(student, targets, weights, values["crops"], values["student_temperature"])
        loss.backward()
        assert loss.item() == pytest.approx(step["loss"], **CLOSE)
        assert student.grad.norm().item() == pytest.approx(step["student_grad_norm"], **CLOSE)
        center = tensor(step["center_after"])


def test_ibot_loss_by_hand():
    """Two masked crops of four: one with a single patch, one with two; the crop's weight is shared by its patches."""
    logits = tensor([[0.0, 0.0], [0.0, math.log(3)], [0.0, math.log(3)]])
    targets = tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]])
    loss = ibot_loss(logits, targets, tensor([1.0, 0.5, 0.5]), 4, 1.0)
    expected = (math.log(2) + (math.log(4) + math.log(4 / 3)) / 2) / 4
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_a_crop_counts_the_same_in_ibot_however_many_of_its_patches_are_masked():
    row, target = tensor([[0.3, -0.2, 0.9]]), tensor([[0.2, 0.5, 0.3]])
    losses = {
        m: ibot_loss(row.repeat(m, 1), target.repeat(m, 1), torch.full((m,), 1 / m), 1, 0.1).item() for m in (1, 3, 17)
    }
    assert losses[3] == pytest.approx(losses[1], rel=1e-6)
    assert losses[17] == pytest.approx(losses[1], rel=1e-6)


def test_padding_of_weight_0_does_not_change_ibot(wave):
    logits = wave({"shape": (6, 5), "scale": 1.0, "phase": 0.1})
    targets = torch.softmax(wave({"shape": (6, 5), "scale": 4.0, "phase": 0.2}), dim=-1)
    weights = tensor([0.5, 0.5, 1.0, 0.0, 0.0, 0.0])
    padded = ibot_loss(logits, targets, weights, 2, 0.1)
    torch.testing.assert_close(padded, ibot_loss(logits[:3], targets[:3], weights[:3], 2, 0.1))


@pytest.mark.parametrize("case", [0, 1, 2, 3])
def test_koleo_loss_equals_lightly(golden, wave, case):
    """From spread-out features to nearly identical ones; the last is a single image, whose loss is a constant."""
    values = golden("koleo")["cases"][case]
    features = (wave(values["features"]) + values["added"]).requires_grad_()
    loss = koleo_loss(features)
    loss.backward()
    assert loss.item() == pytest.approx(values["loss"], **CLOSE)
    assert features.grad.norm().item() == pytest.approx(values["grad_norm"], rel=1e-4, abs=1e-6)


def test_koleo_loss_by_hand():
    """Unit vectors at 0, 60 and 180 degrees: nearest distances 1, 1 and sqrt(3)."""
    features = tensor([[2.0, 0.0], [0.5, math.sqrt(3) / 2], [-3.0, 0.0]])
    assert koleo_loss(features).item() == pytest.approx(-math.log(math.sqrt(3)) / 3, abs=1e-6)


def test_koleo_loss_of_identical_half_precision_rows_is_finite():
    """In fp16 the reference's eps is 0 and the loss infinite."""
    rows = torch.full((4, 384), 0.25, dtype=torch.float16).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = koleo_loss(rows)
    loss.backward()
    assert loss.dtype == torch.float32
    # sqrt(384) * 1e-8 between the rows, and 1e-8 inside the logarithm.
    assert loss.item() == pytest.approx(-math.log(1e-8 * (math.sqrt(384) + 1)), abs=1e-3)
    assert rows.grad.isfinite().all()


def test_losses_are_computed_in_fp32_whatever_the_logits_are(wave):
    logits = wave({"shape": (2, 4, 9), "scale": 3.0, "phase": 0.0}).bfloat16()
    targets = torch.softmax(wave({"shape": (2, 4, 9), "scale": 3.0, "phase": 1.0}), dim=-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dino = dino_loss(list(logits), list(targets), 0.1)
        ibot = ibot_loss(logits[0], targets[1], torch.ones(4), 4, 0.1)
    torch.testing.assert_close(dino, dino_loss(list(logits.float()), list(targets), 0.1), rtol=0, atol=0)
    torch.testing.assert_close(ibot, ibot_loss(logits[0].float(), targets[1], torch.ones(4), 4, 0.1), rtol=0, atol=0)
    assert dino.dtype == ibot.dtype == torch.float32


@pytest.mark.parametrize(
    ("targets", "entropy"),
    [([[0.25, 0.25, 0.25, 0.25]], math.log(4)), ([[0.0, 1.0]], 0.0), ([[0.5, 0.5], [1.0, 0.0]], math.log(2) / 2)],
)
def test_teacher_entropy_is_the_mean_entropy_in_nats(targets, entropy):
    assert teacher_entropy(tensor(targets)).item() == pytest.approx(entropy, abs=1e-7)
