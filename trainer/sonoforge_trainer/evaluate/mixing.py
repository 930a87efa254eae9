"""Mixed training batches for classification: mixup (arXiv 1710.09412), CutMix (arXiv 1905.04899), label smoothing."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def soft_targets(targets_n: Tensor, classes: int, smoothing: float) -> Tensor:
    """One-hot targets [n, K] of which the share `smoothing` is spread evenly over all classes; rows sum to one."""
    one_hot = torch.nn.functional.one_hot(targets_n, classes).float()
    return one_hot * (1 - smoothing) + smoothing / classes


def mix(
    images_nchw: Tensor, targets_nk: Tensor, random: np.random.Generator, *, mixup: float, cutmix: float
) -> tuple[Tensor, Tensor]:
    """Each image mixed with another of the batch, and its targets in the same shares.

    `mixup` and `cutmix` are the alphas of the Beta distribution that the share is drawn from; 0 switches one off. With
    both, the batch is given to either with probability one half. The share is one for the batch, as in the papers.
    """
    if not mixup and not cutmix:
        return images_nchw, targets_nk
    cuts = bool(cutmix) and (not mixup or random.random() < 0.5)
    alpha = cutmix if cuts else mixup
    share = float(random.beta(alpha, alpha))
    others = torch.from_numpy(random.permutation(len(images_nchw))).to(images_nchw.device)
    if cuts:
        images_nchw, share = cut(images_nchw, others, share, *random.random(2).tolist())
    else:
        images_nchw = torch.lerp(images_nchw[others], images_nchw, share)
    return images_nchw, torch.lerp(targets_nk[others], targets_nk, share)


def cut(images_nchw: Tensor, others_n: Tensor, share: float, down: float, right: float) -> tuple[Tensor, float]:
    """Images with a box of others pasted in, and the share that is their own.

    The box has the aspect of the image and 1 - `share` of its area, its centre at (`down`, `right`) of the sides. What
    of it lies outside is cut off, so the share that is returned is counted in pixels.
    """
    height, width = images_nchw.shape[-2:]
    half = math.sqrt(1 - share) / 2
    top, bottom = (round(min(max(down + edge, 0), 1) * height) for edge in (-half, half))
    left, rightmost = (round(min(max(right + edge, 0), 1) * width) for edge in (-half, half))
    mixed = images_nchw.clone()
    mixed[..., top:bottom, left:rightmost] = images_nchw[others_n][..., top:bottom, left:rightmost]
    return mixed, 1 - (bottom - top) * (rightmost - left) / (height * width)
