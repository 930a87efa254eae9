"""The three losses of DINOv2 (arXiv 2304.07193) as pure functions, in fp32 whatever the precision around them.

Targets come from centering or Sinkhorn-Knopp and carry no gradient. Shape suffixes: b images of a view, m masked
patches, k prototypes, n rows of any kind, d width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

KOLEO_EPS = 1e-8


def dino_loss(student_logits: Sequence[Tensor], targets: Sequence[Tensor], temperature: float) -> Tensor:
    """Mean cross-entropy over all pairs of a student crop and a teacher view that are not the same crop.

    With 2 global and 8 local crops these are 2 + 16 = 18 terms of equal weight.

    Args:
        student_logits: One [b, k] for each crop, the global crops first and in the order of `targets`.
        targets: One [b, k] for each global crop: the teacher's distribution for that same crop. Not swapped.
        temperature: Of the student's softmax.

    Raises:
        ValueError: No pair is left, because there is one view only.
    """
    terms = len(student_logits) * len(targets) - min(len(student_logits), len(targets))
    if terms < 1:
        raise ValueError(
            f"found {len(student_logits)} crops and {len(targets)} teacher views, which leaves no pair to compare; "
            "use 2 global crops, or 1 and at least 1 local crop"
        )
    # Cross-entropy is linear in its target, so a crop meets the sum of all views but its own.
    views = [target_bk.float() for target_bk in targets]
    every_bk = _sum(views)
    losses = []
    for crop, logits_bk in enumerate(student_logits):
        others = views[:crop] + views[crop + 1 :]
        if others:
            target_bk = every_bk if crop >= len(views) else _sum(others)
            losses.append(_cross_entropy(logits_bk, target_bk, temperature).mean())
    return torch.stack(losses).sum() / terms


def ibot_loss(
    student_logits_mk: Tensor, targets_mk: Tensor, weights_m: Tensor, n_crops: int, temperature: float
) -> Tensor:
    """Cross-entropy of masked patches: the mean of each crop, summed and divided by the number of global crops.

    Unmasked crops count in `n_crops`, as in the reference: with half of the crops masked this is half of a true mean.

    Args:
        student_logits_mk: The student's logits of masked patches.
        targets_mk: The teacher's distributions of the same patches, seen unmasked.
        weights_m: 1 / (masked patches of that crop); 0 for padding.
        n_crops: Global crops, masked or not.
        temperature: Of the student's softmax.
    """
    losses_m = _cross_entropy(student_logits_mk, targets_mk.float(), temperature)
    return (losses_m * weights_m.float()).sum() / n_crops


def koleo_loss(cls_nd: Tensor) -> Tensor:
    """Kozachenko-Leonenko regulariser: minus the mean log distance to the nearest neighbour (arXiv 1806.03198).

    Args:
        cls_nd: CLS features of *one* view of different images. Two views of an image would be neighbours at once.
    """
    # Half precision makes rows identical and eps 0: log(0).
    with torch.autocast(cls_nd.device.type, enabled=False):
        x_nd = functional.normalize(cls_nd.float(), dim=-1, eps=KOLEO_EPS)
        with torch.no_grad():
            similarity_nn = (x_nd @ x_nd.T).fill_diagonal_(-2)  # below every cosine
            nearest_n = similarity_nn.argmax(dim=1)
        distance_n = functional.pairwise_distance(x_nd, x_nd[nearest_n], p=2, eps=KOLEO_EPS)
        return torch.log(distance_n + KOLEO_EPS).mean().neg()


def teacher_entropy(targets_nk: Tensor) -> Tensor:
    """Mean entropy of the targets in nats: log(K) where the teacher says nothing, 0 where it is certain."""
    entropy_n: Tensor = torch.special.entr(targets_nk.float()).sum(dim=-1)
    return entropy_n.mean()


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.add, tensors)


def _cross_entropy(logits_nk: Tensor, targets_nk: Tensor, temperature: float) -> Tensor:
    """- sum_k t log softmax(s / temperature), [n]. torch.compile fuses it, so that no fp32 copy of logits is made."""
    return -(targets_nk * functional.log_softmax(logits_nk.float() / temperature, dim=-1)).sum(dim=-1)
