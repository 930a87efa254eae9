"""Teacher outputs become targets: moving-average centre, or Sinkhorn-Knopp over the global batch.

Both are the same operation with another bias over prototypes, `softmax(logits / temperature - bias)`, so targets are
never kept: they are made from the teacher's logits where a loss needs them, and only the bias, one number for each
prototype, is shared between processes. DINO (CLS tokens) and iBOT (masked patches) have a bias each and travel
together: index 0 of the leading axis is DINO, index 1 is iBOT.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sonoforge_trainer.ranks import Ranks

CHUNK_ELEMENTS = 1 << 22
"""Logits that are held in float32 at a time."""


class TeacherLogits(NamedTuple):
    """What the teacher says about one micro-batch of B images, in the precision the head computed it."""

    cls_bk: Tensor
    """Prototype logits of the CLS tokens, [2B, K], view 1 before view 2."""
    patches_mk: Tensor
    """Prototype logits of the masked patches, [M, K]."""


def targets(logits_nk: Tensor, bias_k: Tensor, temperature: float) -> Tensor:
    """Targets [n, K] in float32: each row is a distribution over prototypes."""
    return torch.softmax((logits_nk.float() / temperature).sub_(bias_k), dim=-1)


def center_bias(center_2k: Tensor, temperature: float) -> Tensor:
    """The bias [2, K] of a moving-average centre [2, K] (DINO, arXiv 2104.14294)."""
    return center_2k / temperature


def logit_sums(outputs: Sequence[TeacherLogits]) -> Tensor:
    """Sum of the logits [2, K] of the local micro-batches, in float32."""
    return torch.stack(
        [
            torch.stack([logits_nk.float().sum(0) for logits_nk in kind]).sum(0)
            for kind in ([output.cls_bk for output in outputs], [output.patches_mk for output in outputs])
        ]
    )


def update_center(center_2k: Tensor, mean_2k: Tensor, momentum: float, finite: Tensor) -> None:
    """Move the centre to the mean logits of the global batch, in place, where `finite` (a bool scalar) holds.

    As in the reference, the batch that a mean comes from is not centred with it; the next one is.
    """
    center_2k.copy_(torch.where(finite, center_2k * momentum + mean_2k * (1 - momentum), center_2k))


def sinkhorn_bias(outputs: Sequence[TeacherLogits], temperature: float, iterations: int, ranks: Ranks) -> Tensor:
    """The bias [2, K] of Sinkhorn-Knopp over the global batch (SwAV, arXiv 2006.09882; DINOv2, arXiv 2304.07193).

    `outputs` are the local micro-batches. One iteration scales every prototype, then every sample, to an equal share.
    After the samples' turn a row is `softmax(logits / temperature - bias)`, so the scale of a sample need not be kept,
    the number of samples cancels, and an iteration is

        bias += log(sum over samples of softmax(logits / temperature - bias)).

    The first has no scaled samples yet: it starts at `bias = logsumexp over samples of logits / temperature`, which
    takes one MAX and one SUM over processes. The others take one SUM and cannot overflow or vanish: once prototypes are
    scaled, each column of the n x K matrix adds up to 1, so its largest entry is at least 1/n, and a row adds up to at
    most K; what the softmax leaves of that entry is at least 1/(nK), far above the smallest float32. So three
    iterations make 4 collectives of 2K numbers, and at most one chunk of exponentials exists at a time.
    """
    prototypes, device = outputs[0].cls_bk.shape[1], outputs[0].cls_bk.device
    peak_2k = torch.full((2, prototypes), -torch.inf, device=device)
    for kind, logits_nk in _chunks(outputs):
        torch.maximum(peak_2k[kind], logits_nk.amax(0).float() / temperature, out=peak_2k[kind])
    ranks.max(peak_2k)

    sums_2k = torch.zeros_like(peak_2k)
    for kind, logits_nk in _chunks(outputs):
        sums_2k[kind] += (logits_nk.float() / temperature).sub_(peak_2k[kind]).exp_().sum(0)
    bias_2k = peak_2k.add_(ranks.sum(sums_2k).log_())

    for _ in range(iterations - 1):
        sums_2k = torch.zeros_like(bias_2k)
        for kind, logits_nk in _chunks(outputs):
            sums_2k[kind] += targets(logits_nk, bias_2k[kind], temperature).sum(0)
        bias_2k = bias_2k.add_(ranks.sum(sums_2k).log_())
    return bias_2k


def _chunks(outputs: Sequence[TeacherLogits]) -> Iterator[tuple[int, Tensor]]:
    """All logits in pieces of some rows, with 0 for DINO and 1 for iBOT."""
    for output in outputs:
        for kind, logits_nk in enumerate(output):
            rows = max(1, CHUNK_ELEMENTS // logits_nk.shape[1])
            yield from ((kind, logits_nk[start : start + rows]) for start in range(0, len(logits_nk), rows))
