"""What a run is: `TrainConfig` decides the result, `RunConfig` adds where it is kept and how it is executed.

Every length of time in training is a number of samples (source images), so a changed batch keeps the same curves.
Defaults are the numbers of `dinov2-short`; a preset replaces them, and what the user gives replaces the preset.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from sonoforge_trainer.contract.base import ContractError, Misfit, Part, load_yaml, ordered, refuse
from sonoforge_trainer.contract.init import InitConfig

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
FractionBelowOne = Annotated[float, Field(ge=0, lt=1)]
Ordered = AfterValidator(ordered)

PRESETS = ("dinov2-short", "ultradino", "tiny")
"""The presets that come with the trainer; each is `contract/presets/NAME.yaml`."""

Preset = Literal["dinov2-short", "ultradino", "tiny"]
Arch = Literal["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_giant2"]


class ArchShape(Part):
    """The size of a ViT architecture."""

    embed_dim: PositiveInt
    """Width of a token."""
    depth: PositiveInt
    """Number of blocks."""
    heads: PositiveInt
    """Attention heads per block."""


ARCHS: Mapping[Arch, ArchShape] = {
    "vit_tiny": ArchShape(embed_dim=192, depth=12, heads=3),
    "vit_small": ArchShape(embed_dim=384, depth=12, heads=6),
    "vit_base": ArchShape(embed_dim=768, depth=12, heads=12),
    "vit_large": ArchShape(embed_dim=1024, depth=24, heads=16),
    "vit_giant2": ArchShape(embed_dim=1536, depth=40, heads=24),
}


class ModelConfig(Part):
    """The student and teacher backbone: a pre-norm ViT (DINOv2, arXiv 2304.07193)."""

    arch: Arch = "vit_large"
    """Architecture: vit_tiny 192x12, vit_small 384x12, vit_base 768x12, vit_large 1024x24, vit_giant2 1536x40."""
    depth: PositiveInt | None = None
    """Number of blocks, where it should differ from the architecture's own; null is the architecture's own.

    A preset's depth goes with the preset's arch: who names another arch and no depth gets the other one's own."""
    patch_size: PositiveInt = 16
    """Side of a patch in pixels. Crop sizes must be multiples of it."""
    registers: NonNegativeInt = 0
    """Register tokens (arXiv 2309.16588)."""
    in_channels: Literal[1, 3] = 3
    """1 for gray images, 3 for colour. A gray image feeds a 3-channel model by repetition."""
    ffn: Literal["mlp", "swiglu"] = "mlp"
    """Feed-forward layer of a block."""
    layer_scale: Positive = 1e-5
    """Initial value of LayerScale."""
    drop_path: FractionBelowOne = 0.3
    """Uniform drop-path rate; whole samples of a batch are left out of a block, which saves their compute."""
    pos_embed: Literal["offset", "antialias"] = "offset"
    """How position embeddings are resized: `offset` (0.1, no antialias) as the DINOv2 base models, `antialias`
    (no offset) as the register models."""


class HeadConfig(Part):
    """The projection heads of DINO and iBOT."""

    prototypes: PositiveInt = 65_536
    """Output size K."""
    hidden_dim: PositiveInt = 2048
    """Width of the hidden layers."""
    bottleneck_dim: PositiveInt = 256
    """Width before the weight-normed prototype layer."""
    layers: Annotated[int, Field(ge=1, le=8)] = 3
    """Linear layers up to the bottleneck."""
    shared: bool = True
    """One head for DINO and iBOT, or one each."""


class DataConfig(Part):
    """Where the images come from and how they are read."""

    shards: Annotated[str, Field(pattern=r"^(s3|file)://.+\.json$")]
    """URI of the shard manifest `shards.json`, s3:// or file://."""
    dataset_digest: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")] | None = None
    """Refuse to train on any other dataset than this one."""
    clip_aware: bool = True
    """At most one frame of a clip in a micro-batch."""
    block_shards: PositiveInt = 4
    """Shards whose samples are shuffled together; also what a resumed virtual rank reads again at most."""
    mean: tuple[Fraction, ...] = (0.485, 0.456, 0.406)
    """Mean of each channel, of images scaled to 0..1."""
    std: tuple[Positive, ...] = (0.229, 0.224, 0.225)
    """Standard deviation of each channel, of images scaled to 0..1."""


class CropsConfig(Part):
    """Multi-crop: two global views and several local ones."""

    global_size: PositiveInt = 224
    """Side of a global crop in pixels."""
    global_scale: Annotated[tuple[PositiveFraction, PositiveFraction], Ordered] = (0.32, 1.0)
    """Area range of a global crop, as a part of the image."""
    local_count: NonNegativeInt = 8
    """Number of local crops."""
    local_size: PositiveInt = 96
    """Side of a local crop in pixels."""
    local_scale: Annotated[tuple[PositiveFraction, PositiveFraction], Ordered] = (0.05, 0.32)
    """Area range of a local crop, as a part of the image."""


class AugmentConfig(Part):
    """Augmentation probabilities and strengths.

    The blur probabilities are the ones that really apply. The reference code passes `1 - p`, so the released DINOv2
    weights saw (0, 0.9, 0.5) where their configuration says (1, 0.1, 0.5); the presets carry the first triple.
    """

    horizontal_flip: Fraction = 0.5
    """Probability of a left-right flip, per crop."""
    vertical_flip: Fraction = 0.0
    """Probability of an up-down flip, per crop."""
    jitter: Fraction = 0.8
    """Probability of colour jitter."""
    brightness: NonNegative = 0.4
    """Jitter strength; the factor is uniform in 1 +- this."""
    contrast: NonNegative = 0.4
    """Jitter strength; the factor is uniform in 1 +- this."""
    saturation: NonNegative = 0.2
    """Jitter strength; does nothing on gray images."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Jitter strength; does nothing on gray images."""
    grayscale: Fraction = 0.2
    """Probability of dropping colour; does nothing on gray images."""
    blur: tuple[Fraction, Fraction, Fraction] = (0.0, 0.9, 0.5)
    """Probability of Gaussian blur on global crop 1, global crop 2 and local crops."""
    blur_sigma: Annotated[tuple[Positive, Positive], Ordered] = (0.1, 2.0)
    """Range of the blur's standard deviation in pixels (kernel 9)."""
    solarize: Fraction = 0.2
    """Probability of solarisation at threshold 128, on global crop 2 only."""


class MaskConfig(Part):
    """Block masks for iBOT."""

    probability: Fraction = 0.5
    """Part of the global crops that are masked."""
    ratio: Annotated[tuple[Fraction, Fraction], Ordered] = (0.1, 0.5)
    """Range of the masked part of a masked crop. The targets are fixed, so that shapes never change."""


class LossConfig(Part):
    """Loss weights and targets."""

    dino: NonNegative = 1.0
    """Weight of the DINO loss on CLS tokens."""
    ibot: NonNegative = 1.0
    """Weight of the iBOT loss on masked patches."""
    koleo: NonNegative = 0.1
    """Weight of the KoLeo regulariser, computed in fp32 inside a virtual rank, which then needs 2 images at least."""
    centering: Literal["ema", "sinkhorn"] = "ema"
    """How teacher outputs become targets: moving-average centre, or Sinkhorn-Knopp over the global batch."""
    center_momentum: Fraction = 0.9
    """Momentum of the centre."""
    sinkhorn_iterations: PositiveInt = 3
    """Iterations of Sinkhorn-Knopp."""
    student_temperature: Positive = 0.1
    """Temperature of the student's softmax."""


class ScheduleConfig(Part):
    """Schedules over samples seen. A length that is not given keeps its share of the budget."""

    warmup_samples: NonNegativeInt = 25_600_000
    """Linear warm-up of the learning rate; at most the budget."""
    freeze_last_layer_samples: NonNegativeInt = 2_560_000
    """The prototype layer does not learn before this."""
    teacher_temperature: tuple[Positive, Positive] = (0.04, 0.07)
    """Teacher temperature at the start and after its warm-up (linear)."""
    teacher_temperature_samples: NonNegativeInt = 76_800_000
    """Length of the teacher temperature's warm-up."""
    teacher_momentum: tuple[Fraction, Fraction] = (0.992, 1.0)
    """EMA momentum of the teacher, cosine from the first to the second."""
    weight_decay: tuple[NonNegative, NonNegative] = (0.04, 0.4)
    """Weight decay, cosine from the first to the second."""


class OptimConfig(Part):
    """AdamW."""

    base_lr: Positive = 0.004
    """Learning rate at a global batch of 1024; it scales with sqrt(globalBatch / 1024)."""
    min_lr: NonNegative = 1e-6
    """Learning rate at the end of the cosine; at most the peak that baseLr gives."""
    betas: tuple[FractionBelowOne, FractionBelowOne] = (0.9, 0.999)
    """AdamW coefficients."""
    clip_norm: NonNegative = 3.0
    """Gradient norm limit; 0 for none."""
    clip_by: Literal["module", "global"] = "module"
    """Clip backbone and each head on its own, as the reference does, or all gradients together."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Learning-rate factor from one block to the block below."""
    patch_embed_lr: NonNegative = 0.2
    """Further factor for the patch embedding."""
    decay_tokens: bool = True
    """Weight decay on position, CLS, mask and register tokens, as the reference does."""


class Recipe(Part):
    """The training recipe; a preset gives what is left out."""

    preset: Preset = "dinov2-short"
    """Where numbers that are not given come from."""
    budget_samples: PositiveInt = 256_000_000
    """Length of the run: source images seen, counting repeats. At least one globalBatch."""
    global_batch: PositiveInt = 2048
    """Images in one optimiser step, whatever the number of processes."""
    virtual_ranks: PositiveInt = 32
    """Logical workers of fixed micro-batch globalBatch / virtualRanks. The largest useful number of processes."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of data order, augmentation, masks, drop path and initial weights."""
    crops: CropsConfig = CropsConfig()
    """Multi-crop: two global views and several local ones."""
    augment: AugmentConfig = AugmentConfig()
    """Augmentation probabilities and strengths."""
    masks: MaskConfig = MaskConfig()
    """Block masks for iBOT."""
    head: HeadConfig = HeadConfig()
    """The projection heads of DINO and iBOT."""
    loss: LossConfig = LossConfig()
    """Loss weights and targets."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Schedules over samples seen."""
    optim: OptimConfig = OptimConfig()
    """AdamW."""

    @property
    def micro_batch(self) -> int:
        """Images of one virtual rank in one step."""
        return self.global_batch // self.virtual_ranks

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run; the last one may pass the budget by less than a batch."""
        return math.ceil(self.budget_samples / self.global_batch)

    @model_validator(mode="after")
    def _batch_fits_the_virtual_ranks(self) -> Self:
        batch, ranks = self.global_batch, self.virtual_ranks
        if batch % ranks:
            nearest = batch - batch % ranks or ranks
            refuse(Misfit("globalBatch", batch, f"a multiple of virtualRanks {ranks}, for example {nearest}"))
        return self

    @model_validator(mode="after")
    def _parts_go_together(self) -> Self:
        batch, budget, optim, warmup = self.global_batch, self.budget_samples, self.optim, self.schedule.warmup_samples
        peak = optim.base_lr * math.sqrt(batch / 1024)
        misfits = []
        if budget < batch:
            misfits.append(Misfit("budgetSamples", budget, f"at least one globalBatch, {batch}"))
        if warmup > budget:
            misfits.append(Misfit("schedule.warmupSamples", warmup, f"at most budgetSamples, {budget}"))
        if optim.min_lr > optim.base_lr:
            misfits.append(Misfit("optim.minLr", optim.min_lr, f"at most optim.baseLr, {optim.base_lr:g}"))
        elif optim.min_lr > peak:
            rate = f"{peak:g}, the peak of optim.baseLr {optim.base_lr:g} at globalBatch {batch}"
            misfits.append(Misfit("optim.minLr", optim.min_lr, f"at most {rate}"))
        if self.loss.koleo and self.micro_batch < 2:
            # KoLeo pushes an image away from its nearest neighbour in the micro-batch.
            allowed = (
                f"at most globalBatch {batch} / 2 with loss.koleo {self.loss.koleo:g}, which needs 2 images a virtual "
                "rank; or loss.koleo 0"
            )
            misfits.append(Misfit("virtualRanks", self.virtual_ranks, allowed))
        refuse(*misfits)
        return self


class TrainConfig(Part):
    """Everything the result of a run depends on. It cannot change after the start; another result is another job."""

    model: ModelConfig = ModelConfig()
    """The student and teacher backbone."""
    data: DataConfig
    """Where the images come from and how they are read."""
    recipe: Recipe = Recipe()
    """The training recipe."""
    init: Annotated[InitConfig | None, Field(exclude_if=lambda init: init is None)] = None
    """Weights to start from. Not given: random ones, by recipe.seed."""

    @classmethod
    def resolve(cls, document: object, *, where: str = "training") -> Self:
        """Build a config from a document: the preset's numbers, replaced by what is given.

        A null is given too: it replaces a preset's value, where the field may be null. Schedule lengths that are not
        given, or are null, keep their share of the budget. Raises ContractError.
        """
        if not isinstance(document, Mapping):
            raise ContractError(f"{where}: found {document!r}. Allowed: a mapping with the keys model, data, recipe")
        recipe = document.get("recipe") or {}
        name = recipe.get("preset", "dinov2-short") if isinstance(recipe, Mapping) else "dinov2-short"
        if name not in PRESETS:
            raise ContractError(f"{where}.recipe.preset: found {name!r}. Allowed: one of {', '.join(PRESETS)}")
        base = _depth_of_another_arch(preset(name), document)
        return cls.parse(_scale_schedule(base, _merge(base, document), document), where=where)

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        patch, channels, data, crops = self.model.patch_size, self.model.in_channels, self.data, self.recipe.crops
        misfits = []
        for name, size in (("globalSize", crops.global_size), ("localSize", crops.local_size)):
            if size % patch:
                nearest = max(1, round(size / patch)) * patch
                allowed = f"a multiple of model.patchSize {patch}, for example {nearest}"
                misfits.append(Misfit(f"recipe.crops.{name}", size, allowed))
        for name, values in (("mean", data.mean), ("std", data.std)):
            if len(values) != channels:
                allowed = f"one number for each of model.inChannels {channels}"
                misfits.append(Misfit(f"data.{name}", list(values), allowed))
        refuse(*misfits)
        return self

    @model_validator(mode="after")
    def _the_backbone_learns_within_the_budget(self) -> Self:
        if self.init is None:
            return self
        budget = self.recipe.budget_samples
        frozen, ramp = self.init.frozen_samples(budget), self.init.ramp_samples(budget)
        if frozen + ramp > budget:
            allowed = f"at most recipe.budgetSamples {budget} less init.rampBackboneSamples {ramp}"
            refuse(Misfit("init.freezeBackboneSamples", frozen, allowed))
        return self


class CheckpointConfig(Part):
    """When checkpoints are made, where they go and which are kept."""

    uri: Annotated[str, Field(pattern=r"^(s3|file)://.+")]
    """Prefix of the run's checkpoints, s3:// or file://. One run owns it."""
    every_seconds: PositiveInt | None = None
    """Make a checkpoint after this much time; 300 where neither this nor everySamples is given."""
    every_samples: PositiveInt | None = None
    """Make a checkpoint each time this many samples were seen."""
    keep_last: PositiveInt = 3
    """Keep the newest ones."""
    keep_every_samples: PositiveInt | None = None
    """Keep also the first one at or after each multiple of this."""
    keep_best: NonNegativeInt = 1
    """Keep also the ones with the best scores, compared on validation as bestBy is."""

    @property
    def interval_seconds(self) -> int | None:
        """Seconds between checkpoints, or None where only samples count."""
        return self.every_seconds or (None if self.every_samples else 300)


class ExecutionConfig(Part):
    """How the run is executed; nothing here changes its result beyond rounding."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tensors live."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast type of the backbone and the heads; auto is bf16 on CUDA and fp32 on CPU."""
    compile: bool | None = None
    """torch.compile each block. Not given: on CUDA only."""
    loader_workers: NonNegativeInt | None = None
    """Decode workers of a process. Not given: its CPUs, less one. 0 decodes in the training process."""
    prefetch_batches: PositiveInt = 4
    """Micro-batches each worker keeps ready."""
    cache_dir: str | None = None
    """Folder for verified shards. Not given: a private temporary folder."""
    cache_bytes: PositiveInt = 8 * 2**30
    """Size limit of the shard cache."""
    log_every_steps: PositiveInt = 10
    """Steps between metric records, which hold means over these steps."""
    record_samples: bool = False
    """Keep the keyed hash of every sample used, by step and virtual rank, in the checkpoints."""
    tensorboard_dir: str | None = None
    """Folder for TensorBoard event files. Not given: none are written."""
    collective_timeout_seconds: PositiveInt = 300
    """A collective that takes longer counts as failed."""


class RunConfig(Part):
    """What a worker process is started with: the trainer's whole configuration file."""

    job: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
    """Name of the job."""
    uid: Annotated[str, Field(min_length=1, max_length=64)]
    """Identity of the job; two jobs of the same name differ in it."""
    training: TrainConfig
    """What decides the result."""
    checkpoints: CheckpointConfig
    """Durable state."""
    execution: ExecutionConfig = ExecutionConfig()
    """How it runs."""


@cache
def preset(name: Preset) -> Mapping[str, Any]:
    """The numbers of a preset, as a document with the keys model, data, recipe. Do not modify it."""
    text = resources.files(__package__).joinpath("presets", f"{name}.yaml").read_text()
    document = load_yaml(text, where=f"preset {name}")
    assert isinstance(document, dict)
    return document


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        before = merged.get(key)
        if not isinstance(before, Mapping):
            merged[key] = value
        elif value is not None:  # a section without lines is null in YAML, and replaces nothing
            merged[key] = _merge(before, value) if isinstance(value, Mapping) else value
    return merged


def _depth_of_another_arch(base: Mapping[str, Any], given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The preset without its depth, where another architecture than the preset's is given."""
    model = given.get("model")
    arch = model.get("arch") if isinstance(model, Mapping) else None
    if arch in (None, base["model"]["arch"]):
        return base
    return {**base, "model": {key: value for key, value in base["model"].items() if key != "depth"}}


_SCHEDULE_LENGTHS = ("warmupSamples", "freezeLastLayerSamples", "teacherTemperatureSamples")


def _scale_schedule(base: Mapping[str, Any], merged: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    recipe = merged["recipe"]
    if not isinstance(recipe, Mapping) or not isinstance(recipe.get("schedule"), Mapping):
        return merged  # Validation names the fault.
    budget = recipe.get("budgetSamples")
    if not isinstance(budget, int) or isinstance(budget, bool):
        return merged
    chosen = (given.get("recipe") or {}).get("schedule") or {}
    schedule = dict(recipe["schedule"])
    for name in _SCHEDULE_LENGTHS:
        if chosen.get(name) is None:
            schedule[name] = base["recipe"]["schedule"][name] * budget // base["recipe"]["budgetSamples"]
    return {**merged, "recipe": {**recipe, "schedule": schedule}}
