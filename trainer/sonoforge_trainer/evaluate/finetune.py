"""`finetune`: backbone and classifier trained together on labelled images, from the evaluated weights or from scratch.

The classifier is a linear layer on the CLS token behind a batch normalisation without weights, as in the paper (arXiv
2506.19552). The epoch with the best balanced accuracy on validation is kept, and the test split is looked at once, with
it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import structlog
import torch
from torch import Tensor, nn
from torch.nn import functional

from sonoforge_trainer.contract import VALIDATION_PREFIX, FinetuneOptions
from sonoforge_trainer.evaluate.metrics import Floats, Ints, Predictions, scores_over_draws
from sonoforge_trainer.evaluate.mixing import mix, soft_targets
from sonoforge_trainer.evaluate.problem import Finding
from sonoforge_trainer.evaluate.tuning import (
    BestState,
    Tunable,
    batches,
    in_batches,
    parameter_groups,
    seed_of,
    seeded,
    set_rates,
    warm_cosine,
)

_log = structlog.get_logger(__name__)

BETAS = (0.9, 0.999)
"""AdamW coefficients."""


@dataclass(frozen=True)
class FinetuneTask:
    """Labelled images by split. Targets are indices into `classes`, which are label texts in sorted order."""

    classes: tuple[str, ...]
    """Label texts."""
    rows: Mapping[str, Ints]
    """Rows of the set's table."""
    targets: Mapping[str, Ints]
    """Class of each row."""
    groups: Mapping[str, Ints]
    """Number of each row's patient (or clip)."""


@dataclass(frozen=True)
class Finetuned:
    """What one training gave."""

    val: Predictions
    """On validation at the chosen epoch."""
    test: Predictions
    """On test."""
    chosen: str
    """The epoch."""
    candidates: dict[str, float]
    """Balanced accuracy on validation by epoch."""


class Classifier(nn.Module):
    """A backbone with a linear classifier on its CLS token."""

    def __init__(self, source: Tunable, classes: int, options: FinetuneOptions, seed: int) -> None:
        super().__init__()
        self.backbone = (
            source.teacher(options.drop_path)
            if options.source == "teacher"
            else source.scratch(options.drop_path, seed)
        )
        dim = self.backbone.embed_dim
        self.head = seeded(seed, lambda: _head(dim, classes)).to(source.device)
        self.train()

    def forward(self, images_nchw: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Logits [n, K]. `generator` is for drop path."""
        (features,) = self.backbone([images_nchw], generator=generator)
        return cast(Tensor, self.head(features.cls))

    def optimiser(self, options: FinetuneOptions) -> torch.optim.AdamW:
        """AdamW with layer decay."""
        groups = parameter_groups(
            self.backbone,
            self.head,
            backbone_lr=options.learning_rate,
            head_lr=options.learning_rate,
            layer_decay=options.layer_decay,
            decay=options.weight_decay,
        )
        return torch.optim.AdamW(groups, betas=BETAS)


def finetune(source: Tunable, task: FinetuneTask, options: FinetuneOptions, *, resamples: int, seed: int) -> Finding:
    """Train `options.runs` times; scores are those of `knn`, with several runs their means and deviations.

    Per-class numbers and the confusion counts in the details are those of the first run.
    """
    runs = [train(source, task, options, seed=seed_of(seed, run)) for run in range(options.runs)]
    scores = scores_over_draws([run.test for run in runs], resamples=resamples, seed=seed)
    on_val = scores_over_draws([run.val for run in runs], resamples=0, seed=seed)
    scores |= {f"{VALIDATION_PREFIX}{metric}": score for metric, score in on_val.items()}
    details = runs[0].test.details(task.classes)
    details["images"] = {split: len(rows) for split, rows in task.rows.items()}
    details["validation_balanced_accuracy"] = runs[0].candidates
    if len(runs) > 1:
        details["chosen_of_each_run"] = [run.chosen for run in runs]
    return Finding(scores, runs[0].chosen, details)


def train(source: Tunable, task: FinetuneTask, options: FinetuneOptions, *, seed: int) -> Finetuned:
    """One training. Everything follows from the seed."""
    classes = len(task.classes)
    model = Classifier(source, classes, options, seed)
    optimiser = model.optimiser(options)
    drop_path = torch.Generator().manual_seed(seed)
    targets = torch.from_numpy(task.targets["train"])
    of_epoch = math.ceil(len(targets) / options.batch)
    steps = options.epochs * of_epoch
    kept = BestState(model)
    on_val: dict[str, Floats] = {}
    stream = batches(
        source, task.rows["train"], None, batch=options.batch, steps=steps, augment=options.augment, seed=seed
    )
    for step, batch in enumerate(stream):
        set_rates(optimiser, warm_cosine(step, options.warmup, steps))
        wanted = soft_targets(targets[torch.from_numpy(batch.places)], classes, options.label_smoothing)
        images, wanted = mix(
            batch.images,
            wanted.to(source.device),
            np.random.default_rng([seed, step]),
            mixup=options.mixup,
            cutmix=options.cutmix,
        )
        loss = functional.cross_entropy(model(images, drop_path), wanted)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        if (step + 1) % of_epoch == 0:
            epoch = (step + 1) // of_epoch
            name = f"epoch {epoch}"
            on_val[name] = probabilities(model, source, task.rows["val"])
            kept.offer(name, _predictions(task, "val", on_val[name]).balanced_accuracy())
            _log.info("validated", protocol="finetune", epoch=epoch, balanced_accuracy=round(kept.candidates[name], 4))
    chosen = kept.restore()
    on_test = probabilities(model, source, task.rows["test"])
    return Finetuned(
        _predictions(task, "val", on_val[chosen]), _predictions(task, "test", on_test), chosen, kept.candidates
    )


@torch.no_grad()
def probabilities(model: Classifier, source: Tunable, rows: Ints) -> Floats:
    """Class probabilities [n, K] of images that are not augmented."""
    model.eval()
    found = [model(source.normalise(source.pixels(batch))).softmax(1).cpu() for batch in in_batches(rows)]
    model.train()
    return cast(Floats, torch.cat(found).numpy())


def _predictions(task: FinetuneTask, split: str, probabilities_nk: Floats) -> Predictions:
    return Predictions(probabilities_nk, task.targets[split], task.groups[split])


def _head(dim: int, classes: int) -> nn.Sequential:
    linear = nn.Linear(dim, classes)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(dim, affine=False), linear)
