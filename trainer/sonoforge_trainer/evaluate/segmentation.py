"""`segment`: a decoder trained on masks, on a frozen backbone or together with it.

Images and masks are seen at the model's resolution in training. Logits of validation and test are upsampled to the size
of each image's own mask and compared there, as in `segment-probe`. The step with the best pooled foreground Dice on
validation is kept, and the test split is looked at once, with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self, cast

import numpy as np
import numpy.typing as npt
import structlog
import torch
from torch import Tensor, nn
from torch.nn import functional

from sonoforge_trainer.contract import VALIDATION_PREFIX, Score, SegmentOptions
from sonoforge_trainer.evaluate.decoders import LinearDecoder, UperNet, decoder_blocks, token_maps
from sonoforge_trainer.evaluate.evidence import segmented
from sonoforge_trainer.evaluate.metrics import Ints, confusion_matrix
from sonoforge_trainer.evaluate.overlap import foreground_dice, overlap_details, overlap_scores_over_draws
from sonoforge_trainer.evaluate.overlays import extremes
from sonoforge_trainer.evaluate.problem import Finding
from sonoforge_trainer.evaluate.segment import decode_mask, upsampled_classes, validation_images
from sonoforge_trainer.evaluate.tuning import (
    BestState,
    Tunable,
    batches,
    in_batches,
    parameter_groups,
    seed_of,
    seeded,
    set_rates,
    warm_poly,
)

_log = structlog.get_logger(__name__)

BETAS = (0.9, 0.999)
"""AdamW coefficients."""


@dataclass(frozen=True)
class SegmentTask:
    """Images with masks by split. Value v of a mask is class `classes[v]`, and class 0 is the background."""

    classes: tuple[str, ...]
    """Names of the classes, from the set's manifest."""
    rows: Mapping[str, Ints]
    """Rows of the set's table."""
    masks: Mapping[str, Sequence[bytes]]
    """Index PNG of each row."""
    groups: Mapping[str, Ints]
    """Number of each row's patient (or clip)."""

    def training_masks(self, places: Ints, side: int) -> Tensor:
        """Masks of some training images, uint8 [n, side, side], each pixel the nearest class."""
        masks = []
        for place in places:
            mask = torch.from_numpy(decode_mask(self.masks["train"][int(place)], len(self.classes)).copy())
            masks.append(functional.interpolate(mask[None, None].float(), (side, side), mode="nearest-exact")[0, 0])
        return torch.stack(masks).to(torch.uint8)


@dataclass(frozen=True)
class Segmented:
    """What one training gave."""

    val: Ints
    """Confusion counts [images, K, K] of the validation images at the chosen step."""
    test: Ints
    """Of the test images."""
    chosen: str
    """The step."""
    candidates: dict[str, float]
    """Pooled foreground Dice on validation by step."""
    masks: Mapping[int, npt.NDArray[np.uint8]] = field(default_factory=dict)
    """Predicted classes [H, W] of the best and worst test images, by place in the split; empty unless asked for."""


class Segmenter(nn.Module):
    """Backbone and decoder. A frozen backbone is in eval mode and gets no gradient, whatever mode the module is in."""

    def __init__(self, source: Tunable, classes: int, options: SegmentOptions, seed: int) -> None:
        super().__init__()
        self.frozen = options.backbone == "frozen"
        self.backbone = source.teacher(options.drop_path)
        dim = self.backbone.embed_dim
        self.grid = source.grid
        self.blocks = blocks_of(options, self.backbone.depth)
        self.decoder = seeded(
            seed,
            lambda: (
                LinearDecoder(dim, classes)
                if options.decoder == "linear"
                else UperNet(dim, classes, options.channels or dim)
            ),
        ).to(source.device)
        if self.frozen:
            self.backbone.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """As torch's, but a frozen backbone stays in eval mode, so that drop path does not blur its features."""
        super().train(mode)
        self.backbone.train(mode and not self.frozen)
        return self

    def forward(self, images_nchw: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Logits [n, K, h, w] on the patch grid, for UPerNet on four times the grid. `generator` is for drop path."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.backbone.after_blocks(images_nchw, self.blocks, generator=generator)
        return cast(Tensor, self.decoder(token_maps(features, self.grid)))

    def optimiser(self, options: SegmentOptions) -> torch.optim.AdamW:
        """AdamW over what is trained."""
        groups = parameter_groups(
            None if self.frozen else self.backbone,
            self.decoder,
            backbone_lr=options.backbone_learning_rate,
            head_lr=options.learning_rate,
            layer_decay=options.layer_decay,
            decay=options.weight_decay,
        )
        return torch.optim.AdamW(groups, betas=BETAS)


def segment(
    source: Tunable, task: SegmentTask, options: SegmentOptions, *, draws: int, resamples: int, seed: int
) -> Finding:
    """Train on the whole training split, and on draws of patients where `options.shots` asks for it.

    Scores are `[val_][{N}shot_]{dice|iou}_{mean|foreground}[_per_image]`; those with shots are means over the draws. In
    every training the best step is chosen on the set's validation split, as the paper does also for few shots.
    Outcomes and predicted masks of single images are those of the training on the whole split.
    """
    still = still_maps(source, task, options)
    everything = np.arange(len(task.rows["train"]))
    whole = train(source, task, everything, options, still, seed=seed_of(seed, 0), keep_masks=True)
    scores = _scores(task, [whole], "", resamples, seed)
    details: dict[str, object] = {
        "images": {split: len(rows) for split, rows in task.rows.items()},
        "compared_at": "mask resolution",
        "validation_dice_foreground": whole.candidates,
        **overlap_details(whole.test, task.classes),
    }
    few: dict[str, object] = {}
    for shots in options.shots:
        seeds = [seed_of(seed, draw) for draw in range(draws)]
        drawn = [draw_groups(task.groups["train"], shots, of_draw) for of_draw in seeds]
        trained = [
            train(source, task, places, options, still, seed=of_draw)
            for places, of_draw in zip(drawn, seeds, strict=True)
            if len(places)
        ]
        if trained:
            scores |= _scores(task, trained, f"{shots}shot_", resamples, seed)
        few[str(shots)] = {
            "train_images_of_each_draw": [len(places) for places in drawn],
            "chosen": [draw.chosen for draw in trained],
            "dice_foreground": [foreground_dice(draw.test) for draw in trained],
        }
    return Finding(
        scores,
        whole.chosen,
        details | ({"shots": few} if few else {}),
        segmented(task.classes, task.groups["test"], whole.test),
        lambda places: [whole.masks[place].astype(np.int64) for place in places],
    )


def draw_groups(groups_n: Ints, shots: int, seed: int) -> Ints:
    """Places of all images of `shots` groups (patients), sorted; none where there are fewer groups."""
    groups = np.unique(groups_n)
    if len(groups) < shots:
        return np.zeros(0, np.int64)
    drawn = np.random.default_rng([seed, shots]).choice(groups, shots, replace=False)
    return np.flatnonzero(np.isin(groups_n, drawn)).astype(np.int64)


@torch.no_grad()
def still_maps(source: Tunable, task: SegmentTask, options: SegmentOptions) -> list[Tensor] | None:
    """What each block gives a decoder of every training image [n, d, h, w], where that never changes; else None.

    With a frozen backbone and without augmentation one pass over the images serves all steps of all trainings.
    """
    if options.backbone == "tuned" or options.augment:
        return None
    blocks = blocks_of(options, source.backbone.depth)
    passes = [
        token_maps(source.backbone.after_blocks(source.normalise(source.pixels(rows)), blocks), source.grid)
        for rows in in_batches(task.rows["train"])
    ]
    return [torch.cat(maps) for maps in zip(*passes, strict=True)]


def blocks_of(options: SegmentOptions, depth: int) -> tuple[int, ...]:
    """The blocks that a decoder reads."""
    four = decoder_blocks(depth)
    return four[-1:] if options.decoder == "linear" else four


def train(
    source: Tunable,
    task: SegmentTask,
    places: Ints,
    options: SegmentOptions,
    still: list[Tensor] | None = None,
    *,
    seed: int,
    keep_masks: bool = False,
) -> Segmented:
    """One training on some of the training images, by their places in the split. Everything follows from the seed.

    `still` are the maps of all training images, where they do not change; see `still_maps`. `keep_masks` keeps the
    predicted masks of the best and worst test images, so that nobody has to keep the model.
    """
    model = Segmenter(source, len(task.classes), options, seed)
    optimiser = model.optimiser(options)
    side = source.resolution
    drop_path = torch.Generator().manual_seed(seed)
    validation = validation_images(len(task.rows["val"]))
    kept = BestState(model.decoder if model.frozen else model)
    on_val: dict[str, Ints] = {}
    stream = batches(
        source,
        task.rows["train"][places],
        task.training_masks(places, side),
        batch=options.batch,
        steps=options.steps,
        augment=options.augment,
        seed=seed,
    )
    for step, batch in enumerate(stream):
        set_rates(optimiser, warm_poly(step, options.warmup, options.steps))
        assert batch.masks is not None
        if still is None:
            logits = model(batch.images, drop_path)
        else:
            logits = model.decoder([maps[torch.from_numpy(places[batch.places])] for maps in still])
        loss = segment_loss(functional.interpolate(logits, (side, side), mode="bilinear"), batch.masks)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        done = step + 1
        if done % options.validate_every == 0 or done == options.steps:
            name = f"step {done}"
            on_val[name] = counts(model, source, task, "val", validation)
            kept.offer(name, foreground_dice(on_val[name]))
            _log.info("validated", protocol="segment", step=done, dice_foreground=round(kept.candidates[name], 4))
    chosen = kept.restore()
    on_test = counts(model, source, task, "test", range(len(task.rows["test"])))
    shown = shown_places(task, on_test) if keep_masks else ()
    pairs = compared(model, source, task, "test", shown)
    masks = {place: predicted.astype(np.uint8) for place, (_, predicted) in zip(shown, pairs, strict=True)}
    return Segmented(on_val[chosen], on_test, chosen, kept.candidates, masks)


def segment_loss(logits_nkhw: Tensor, masks_nhw: Tensor) -> Tensor:
    """Mean cross-entropy over pixels plus soft Dice loss.

    Soft Dice of a class is 2 sum(p g) / (sum(p) + sum(g)) over the whole batch, with probabilities p and truth g; one
    pixel is added above and below, so that a class that is in neither costs nothing. The loss is 1 - its mean over all
    classes, the background among them (arXiv 1606.04797, without the squares).
    """
    probabilities = logits_nkhw.softmax(1)
    truth = functional.one_hot(masks_nhw, logits_nkhw.shape[1]).movedim(-1, 1).to(probabilities.dtype)
    both, sizes = (probabilities * truth).sum((0, 2, 3)), (probabilities + truth).sum((0, 2, 3))
    soft_dice = (2 * both + 1) / (sizes + 1)
    return functional.cross_entropy(logits_nkhw, masks_nhw) + 1 - soft_dice.mean()


def counts(model: Segmenter, source: Tunable, task: SegmentTask, split: str, places: Sequence[int]) -> Ints:
    """Confusion counts [images, K, K] of some images of a split, at the size of their masks."""
    size = len(task.classes)
    pairs = compared(model, source, task, split, places)
    return np.stack([confusion_matrix(mask.reshape(-1), predicted.reshape(-1), size) for mask, predicted in pairs])


@torch.no_grad()
def compared(
    model: Segmenter, source: Tunable, task: SegmentTask, split: str, places: Sequence[int]
) -> Iterator[tuple[Ints, Ints]]:
    """True and predicted classes [H, W] of some images of a split, at the size of their masks."""
    model.eval()
    for batch in in_batches(places):
        logits = model(source.normalise(source.pixels(task.rows[split][batch]))).cpu()
        for place, logits_khw in zip(batch, logits, strict=True):
            mask = decode_mask(task.masks[split][place], len(task.classes)).astype(np.int64)
            yield mask, upsampled_classes(logits_khw, mask.shape)
    model.train()


def shown_places(task: SegmentTask, counts_ikk: Ints) -> tuple[int, ...]:
    """Places of the test images that a page shows, from their confusion counts; none where no mask has a foreground."""
    samples = segmented(task.classes, task.groups["test"], counts_ikk)
    found = extremes(samples) if samples is not None else None
    return found.images if found is not None else ()


def _scores(
    task: SegmentTask, trained: Sequence[Segmented], prefix: str, resamples: int, seed: int
) -> dict[str, Score]:
    """Overlaps of one or several trainings on test, with intervals, and on validation, without."""
    validation = validation_images(len(task.rows["val"]))
    test = overlap_scores_over_draws([t.test for t in trained], task.groups["test"], resamples=resamples, seed=seed)
    val = overlap_scores_over_draws([t.val for t in trained], task.groups["val"][validation], resamples=0, seed=seed)
    named = {f"{prefix}{metric}": score for metric, score in test.items()}
    return named | {f"{VALIDATION_PREFIX}{prefix}{metric}": score for metric, score in val.items()}
