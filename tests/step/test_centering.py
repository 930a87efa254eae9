"""Sinkhorn-Knopp and the moving-average centre against their textbook forms."""

import pytest
import torch

from sonoforge_trainer.centering import (
    TeacherLogits,
    center_bias,
    logit_sums,
    sinkhorn_bias,
    targets,
    update_center,
)
from sonoforge_trainer.ranks import Ranks


def textbook_sinkhorn(logits_nk, temperature, iterations=3):
    """The published exponential form: alternate scaling of a prototypes x samples matrix, in float64."""
    q_kn = torch.exp(logits_nk.double() / temperature).T
    q_kn /= q_kn.sum()
    prototypes, samples = q_kn.shape
    for _ in range(iterations):
        q_kn /= q_kn.sum(dim=1, keepdim=True) * prototypes
        q_kn /= q_kn.sum(dim=0, keepdim=True) * samples
    return (q_kn * samples).T


def micro_batches(count=3, rows=8, patches=23, prototypes=96, scale=1.0, seed=0):
    """Teacher logits in the range of cosines times `scale`."""
    generator = torch.Generator().manual_seed(seed)
    return [
        TeacherLogits(
            scale * (2 * torch.rand(rows, prototypes, generator=generator) - 1),
            scale * (2 * torch.rand(patches, prototypes, generator=generator) - 1),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("temperature", [0.04, 0.07])
@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
def test_sinkhorn_equals_the_textbook_form_over_all_micro_batches(temperature, iterations):
    outputs = micro_batches()
    bias_2k = sinkhorn_bias(outputs, temperature, iterations, Ranks.single())
    for kind in range(2):
        together = torch.cat([output[kind] for output in outputs])
        ours = targets(together, bias_2k[kind], temperature)
        expected = textbook_sinkhorn(together, temperature, iterations)
        assert (ours - expected).abs().max() <= (5e-7 if iterations == 3 else 1e-6)
        torch.testing.assert_close(ours.sum(1), torch.ones(len(together)), rtol=0, atol=2e-6)


def test_sinkhorn_survives_logits_of_fifty():
    outputs = micro_batches(scale=50.0)
    bias_2k = sinkhorn_bias(outputs, 0.04, 3, Ranks.single())
    assert bias_2k.isfinite().all()
    for output in outputs:
        for kind in range(2):
            rows = targets(output[kind], bias_2k[kind], 0.04)
            assert rows.isfinite().all()
            torch.testing.assert_close(rows.sum(1), torch.ones(len(rows)), rtol=0, atol=2e-6)


def test_sinkhorn_survives_a_prototype_that_nobody_wants():
    outputs = micro_batches(scale=50.0)
    for output in outputs:
        output.cls_bk[:, 5] = -50.0
    bias_2k = sinkhorn_bias(outputs, 0.04, 3, Ranks.single())
    assert bias_2k.isfinite().all()


def test_sinkhorn_shares_samples_out_over_prototypes():
    together = torch.cat([output.cls_bk for output in micro_batches(count=32, rows=16)])
    outputs = [TeacherLogits(together, together)]
    before = torch.softmax(together / 0.04, 1).sum(0)
    after = targets(together, sinkhorn_bias(outputs, 0.04, 3, Ranks.single())[0], 0.04).sum(0)
    assert after.std() < before.std() / 2


def test_sinkhorn_accepts_bfloat16_and_micro_batches_without_masks():
    outputs = [TeacherLogits(o.cls_bk.bfloat16(), o.patches_mk[:0].bfloat16()) for o in micro_batches()]
    bias_2k = sinkhorn_bias(outputs, 0.04, 3, Ranks.single())
    assert bias_2k.dtype == torch.float32
    assert bias_2k[0].isfinite().all()


def test_centred_targets_are_a_softmax_of_centred_logits():
    logits_nk, center_2k = torch.randn(5, 7), torch.randn(2, 7)
    expected = torch.softmax((logits_nk - center_2k[1]) / 0.05, 1)
    torch.testing.assert_close(targets(logits_nk, center_bias(center_2k, 0.05)[1], 0.05), expected)


def test_the_centre_moves_to_the_mean_of_the_whole_batch():
    outputs = micro_batches()
    sums_2k = logit_sums(outputs)
    mean_2k = sums_2k / torch.tensor([[3 * 8.0], [3 * 23.0]])
    center_2k = torch.ones(2, 96)
    update_center(center_2k, mean_2k, 0.9, torch.tensor(True))
    for kind in range(2):
        expected = 0.9 + 0.1 * torch.cat([output[kind] for output in outputs]).mean(0)
        torch.testing.assert_close(center_2k[kind], expected)


def test_the_centre_stays_where_the_step_was_not_finite():
    center_2k = torch.randn(2, 4)
    before = center_2k.clone()
    update_center(center_2k, torch.full((2, 4), torch.nan), 0.9, torch.tensor(False))
    assert torch.equal(center_2k, before)
