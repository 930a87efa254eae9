"""Surgery on a backbone that changes what it is fed, and not what it says.

**Channels and normalisation.** A patch embedding sees `(x_c - m_c) / s_c` of an image x in 0..1. On a gray image every
channel is x, so with the kernels W_c [d, p, p] and the bias b its output is

    sum_c W_c * (x - m_c) / s_c + b.

A model of C' channels with means m' and deviations s' says the same with

    W'_k = s'_k / C' * sum_c W_c / s_c
    b'   = b + sum_c (S m'_c - m_c) / s_c * sum_ij W_c[:, i, j]

where S m' is the mean of m', which on gray images makes it exact for every m' and s': from 3 to 1 channel this is the
known sum of the kernels, with the deviations inside it. Where C' = C each channel is changed by itself, which is exact
on colour images too. Patches do not overlap and nothing is padded, so no pixel is an exception.

**Positions.** A table of one patch grid becomes that of another, as the backbone itself resizes it at another
resolution, so features at the new resolution stay what they were.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sonoforge_trainer.card import backbone_from_card
from sonoforge_trainer.contract import ModelCard
from sonoforge_trainer.weights.errors import WeightsError

KERNEL, BIAS = "patch_embed.proj.weight", "patch_embed.proj.bias"


def with_input(
    card: ModelCard, tensors: Mapping[str, Tensor], mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[ModelCard, dict[str, Tensor]]:
    """The same model for an input of `len(mean)` channels that is normalised by `mean` and `std`.

    Equal features on gray images, and on all images where the number of channels stays. Raises WeightsError where mean
    and std are not of 1 or 3 channels.
    """
    if len(mean) != len(std) or len(mean) not in (1, 3):
        raise WeightsError(f"found {len(mean)} means and {len(std)} deviations. Allowed: 1 or 3 of each")
    if (mean, std) == (card.mean, card.std):
        return card, dict(tensors)
    kernel_dcpp = tensors[KERNEL].double()
    old_mean, old_std = (torch.tensor(values, dtype=torch.float64) for values in (card.mean, card.std))
    new_mean, new_std = (torch.tensor(values, dtype=torch.float64) for values in (mean, std))
    scaled_dcpp = kernel_dcpp / old_std.view(1, -1, 1, 1)
    sums_dc = scaled_dcpp.sum((2, 3))
    if len(mean) == card.in_channels:
        new_kernel = scaled_dcpp * new_std.view(1, -1, 1, 1)
        shift_c = new_mean - old_mean
    else:
        gray_d1pp = scaled_dcpp.sum(1, keepdim=True)
        new_kernel = gray_d1pp * (new_std / len(mean)).view(1, -1, 1, 1)
        shift_c = new_mean.mean() - old_mean
    changed = dict(tensors)
    changed[KERNEL] = new_kernel.to(tensors[KERNEL].dtype)
    changed[BIAS] = (tensors[BIAS].double() + sums_dc @ shift_c).to(tensors[BIAS].dtype)
    channels = 1 if len(mean) == 1 else 3
    return card.model_copy(update={"in_channels": channels, "mean": mean, "std": std}), changed


def with_resolution(
    card: ModelCard, tensors: Mapping[str, Tensor], resolution: int
) -> tuple[ModelCard, dict[str, Tensor]]:
    """The same model with the position table of another resolution, in pixels.

    Raises WeightsError where the resolution is not a multiple of the patch size.
    """
    if resolution == card.resolution:
        return card, dict(tensors)
    if resolution < card.patch_size or resolution % card.patch_size:
        nearest = max(1, round(resolution / card.patch_size)) * card.patch_size
        raise WeightsError(
            f"found resolution {resolution}. Allowed: a multiple of the patch size, for example {nearest}"
        )
    grid = resolution // card.patch_size
    with torch.no_grad():
        table = backbone_from_card(card, tensors).positions(grid, grid).clone()
    return card.model_copy(update={"resolution": resolution}), {**tensors, "pos_embed": table}
