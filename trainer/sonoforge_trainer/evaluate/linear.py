"""The linear probe of DINOv2: many heads trained at once on frozen features, the best chosen on validation.

{last block, last four blocks} x {without, with the mean patch} x 13 learning rates = 52 heads. SGD with momentum 0.9,
no weight decay, cosine to 0, learning rates scaled by batch / 256, weights N(0, 0.01^2), biases 0. Training
images are not augmented, unlike in the reference: that is what lets all protocols share one feature pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sonoforge_trainer.evaluate.bootstrap import Floats
from sonoforge_trainer.evaluate.problem import Finding, Problem, best, report

LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
"""Learning rates at a batch of 256."""

BATCH = 128
"""Images in a step."""

MIN_STEPS = 500
"""Steps at least: ten passes over a few hundred images would leave every head near its initial weights."""

_MOMENTUM = 0.9
_INITIAL_DEVIATION = 0.01


@dataclass
class Heads:
    """One linear classifier for each learning rate on the same input, trained side by side."""

    weights_hdk: Tensor
    biases_hk: Tensor
    rates_h: Tensor
    weight_speed_hdk: Tensor
    bias_speed_hk: Tensor

    @classmethod
    def new(cls, width: int, classes: int, seed: int, device: torch.device) -> Heads:
        """Heads with equal random weights, so that they differ in nothing but the learning rate."""
        generator = torch.Generator().manual_seed(seed)
        weights = _INITIAL_DEVIATION * torch.randn(width, classes, generator=generator).to(device)
        heads = len(LEARNING_RATES)
        weights_hdk = weights.repeat(heads, 1, 1)
        biases_hk = torch.zeros(heads, classes, device=device)
        rates_h = torch.tensor(LEARNING_RATES, device=device) * (BATCH / 256)
        return cls(weights_hdk, biases_hk, rates_h, torch.zeros_like(weights_hdk), torch.zeros_like(biases_hk))

    def logits(self, features_nd: Tensor) -> Tensor:
        """Logits [heads, n, K]."""
        return torch.einsum("nd,hdk->hnk", features_nd, self.weights_hdk) + self.biases_hk[:, None]

    def step(self, features_nd: Tensor, targets_nk: Tensor, schedule: float) -> None:
        """One step of SGD on the mean cross-entropy. Its gradient in the logits is softmax - target."""
        error_hnk = (torch.softmax(self.logits(features_nd), dim=2) - targets_nk) / len(features_nd)
        self.weight_speed_hdk.mul_(_MOMENTUM).add_(torch.einsum("nd,hnk->hdk", features_nd, error_hnk))
        self.bias_speed_hk.mul_(_MOMENTUM).add_(error_hnk.sum(1))
        self.weights_hdk.sub_((schedule * self.rates_h)[:, None, None] * self.weight_speed_hdk)
        self.biases_hk.sub_((schedule * self.rates_h)[:, None] * self.bias_speed_hk)


def linear(problem: Problem, *, epochs: int, resamples: int, seed: int, device: torch.device) -> Finding:
    """Train every head in one pass over the features, select by balanced accuracy on validation, report on both."""
    classes = len(problem.classes)
    features = {
        name: {split: _tensor(values, device) for split, values in by_split.items()}
        for name, by_split in problem.inputs.items()
    }
    heads = {name: Heads.new(by_split["train"].shape[1], classes, seed, device) for name, by_split in features.items()}
    targets_nk = torch.nn.functional.one_hot(torch.from_numpy(problem.targets["train"]), classes).to(device).float()
    samples = len(targets_nk)
    steps_a_pass = math.ceil(samples / BATCH)
    passes = max(epochs, math.ceil(MIN_STEPS / steps_a_pass))
    total = passes * steps_a_pass
    generator = torch.Generator().manual_seed(seed)
    step = 0
    for _ in range(passes):
        for rows in torch.split(torch.randperm(samples, generator=generator), BATCH):
            batch = rows.to(device)
            schedule = 0.5 * (1 + math.cos(math.pi * step / total))
            for name, group in heads.items():
                group.step(features[name]["train"][batch], targets_nk[batch], schedule)
            step += 1
    candidates, val, test = {}, {}, {}
    for name, group in heads.items():
        val_hnk, test_hnk = (
            torch.softmax(group.logits(features[name][split]), dim=2).cpu().numpy() for split in ("val", "test")
        )
        for rate, val_nk, test_nk in zip(LEARNING_RATES, val_hnk, test_hnk, strict=True):
            candidate = f"{name} lr={rate:g}"
            # A head whose learning rate is too high for the features overflows and can not be chosen.
            finite = bool(np.isfinite(val_nk).all())
            candidates[candidate] = problem.predictions("val", val_nk).balanced_accuracy() if finite else -math.inf
            val[candidate], test[candidate] = val_nk, test_nk
    chosen = best(candidates)
    finite_candidates = {name: value for name, value in candidates.items() if math.isfinite(value)}
    return report(
        problem,
        val[chosen],
        # A test image that overflows counts as the first class, at a chance's odds.
        np.nan_to_num(test[chosen], nan=1 / classes),
        chosen=chosen,
        candidates=finite_candidates,
        resamples=resamples,
        seed=seed,
    )


def _tensor(values: Floats, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device, torch.float32)
