"""One optimiser step of DINOv2 (arXiv 2304.07193) over a global batch, for any number of processes.

`Step.__call__` reads top to bottom in the order of the paper. The global batch is dealt to V virtual ranks; a process
hosts some of them and takes one after the other, so nothing but the order of floating-point sums depends on how many
processes there are. Shapes are static and no value is read back to the host.

Shape suffixes: b images of a virtual rank, n crops, m masked patches, d width, k prototypes; 2 is DINO and iBOT.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sonoforge_trainer import draws
from sonoforge_trainer.centering import (
    TeacherLogits,
    center_bias,
    logit_sums,
    sinkhorn_bias,
    targets,
    update_center,
)
from sonoforge_trainer.contract import ExecutionConfig, TrainConfig
from sonoforge_trainer.loss import dino_loss, ibot_loss, koleo_loss, teacher_entropy
from sonoforge_trainer.micro_batch import MicroBatch
from sonoforge_trainer.model import compile_blocks
from sonoforge_trainer.optim import clip, update_teacher
from sonoforge_trainer.photometric import Photometrics, apply
from sonoforge_trainer.ranks import Ranks
from sonoforge_trainer.schedule import Schedules, ScheduleValues
from sonoforge_trainer.state import TrainState

VIEWS = 2
"""Global crops of an image."""


class Losses(NamedTuple):
    """Parts of the loss of one virtual rank, or their mean over all, before their weights."""

    total: Tensor
    """Weighted sum of the parts: what is minimised."""
    dino: Tensor
    """Cross-entropy of CLS tokens between views."""
    ibot: Tensor
    """Cross-entropy of masked patches."""
    koleo: Tensor
    """KoLeo regulariser, the sum of both global views."""
    teacher_entropy: Tensor
    """Mean entropy of the DINO targets in nats. Not minimised."""


class Signals(NamedTuple):
    """What each process tells the others with a step; added up, so that all of them hear the same."""

    stop: Tensor
    """Processes that were asked to stop."""
    checkpoint: Tensor
    """Processes that were asked for a checkpoint."""
    busy: Tensor
    """Processes that still upload a checkpoint."""
    corrupt: Tensor
    """Samples of the step that were replaced because they could not be decoded."""


@dataclass(frozen=True)
class StepReport:
    """What a step did, as host values."""

    step: int
    """Number of the step, from 0."""
    schedule: ScheduleValues
    """Learning rate, weight decay, teacher momentum and temperature used."""
    losses: dict[str, float]
    """Mean over the global batch of `total`, `dino`, `ibot`, `koleo`, and of `teacher_entropy`."""
    gradient_norms: dict[str, float]
    """Norm before clipping of each module: `backbone`, `dino_head`, `ibot_head` where it is separate."""
    finite: bool
    """Whether the update was made; if not, student, teacher, moments and centre are as before."""
    skipped: int
    """Updates left out since step 0."""
    stop: bool
    """Whether any process was asked to stop; the same on all."""
    checkpoint: bool
    """Whether any process was asked for a checkpoint; the same on all."""
    busy: bool
    """Whether any process was uploading a checkpoint when the step began; the same on all."""
    corrupt: int
    """Samples of the step, on all processes, that were replaced because they could not be decoded."""


@dataclass(frozen=True)
class StepOutput:
    """What a step did, still on the device; fields as in StepReport."""

    step: int
    schedule: ScheduleValues
    losses: Losses
    gradient_norms: dict[str, Tensor]
    finite: Tensor
    skipped: Tensor
    signals: Signals

    def read(self) -> StepReport:
        """Wait for the step and copy its values to the host, at once. Best done while a later step runs."""
        scalars = [*self.losses, *self.gradient_norms.values(), self.finite, self.skipped, *self.signals]
        values = torch.stack([scalar.float() for scalar in scalars]).tolist()
        losses, norms = values[: len(self.losses)], values[len(self.losses) : -6]
        finite, skipped, stop, checkpoint, busy, corrupt = values[-6:]
        return StepReport(
            step=self.step,
            schedule=self.schedule,
            losses=dict(zip(Losses._fields, losses, strict=True)),
            gradient_norms=dict(zip(self.gradient_norms, norms, strict=True)),
            finite=bool(finite),
            skipped=int(skipped),
            stop=bool(stop),
            checkpoint=bool(checkpoint),
            busy=bool(busy),
            corrupt=int(corrupt),
        )


class Sums:
    """What is added up over processes once a step, in one float32 tensor, so that it takes one collective.

    The gradients of the student's parameters are views of it: backward passes accumulate right here.
    """

    def __init__(self, state: TrainState) -> None:
        """Room for the gradients, the teacher's logits where there is a centre, the losses and the signals."""
        prototypes = 0 if state.center_2k is None else state.center_2k.shape[1]
        sizes = [state.layout.size, 2 * prototypes, len(Losses._fields), len(Signals._fields)]
        self.flat = torch.zeros(sum(sizes), device=state.student_flat.device)
        self.gradients, logits, self.losses, self.signals = torch.split_with_sizes(self.flat, sizes)
        self.logits_2k = logits.view(2, prototypes)
        parameters = dict(state.student.named_parameters())
        for name, view in state.layout.views(self.gradients).items():
            parameters[name].grad = view


class Step:
    """Takes a state from one step to the next."""

    def __init__(
        self, training: TrainConfig, state: TrainState, ranks: Ranks, execution: ExecutionConfig | None = None
    ) -> None:
        """Bind the step to a state that it will change, and to the processes of the run.

        Raises ContractError where there are more processes than virtual ranks.
        """
        execution = execution or ExecutionConfig()
        self.recipe, self.data = training.recipe, training.data
        self.state, self.ranks, self.device = state, ranks, state.student_flat.device
        self.virtual_ranks = ranks.virtual_ranks(self.recipe.virtual_ranks)
        self.schedules = Schedules(training)
        self.sums = Sums(state)
        cuda = self.device.type == "cuda"
        self.bf16 = execution.precision == "bf16" or (execution.precision == "auto" and cuda)
        assert self.recipe.micro_batch > 1 or not self.recipe.loss.koleo, "KoLeo needs a neighbour; the contract checks"
        if execution.compile or (execution.compile is None and cuda):
            compile_blocks(state.student.backbone)
            compile_blocks(state.teacher.backbone)

    def __call__(
        self,
        batches: Sequence[MicroBatch],
        step: int,
        *,
        stop: bool = False,
        checkpoint: bool = False,
        busy: bool = False,
    ) -> StepOutput:
        """Train on the micro-batches of this process's virtual ranks, in their order.

        `stop`, `checkpoint` and `busy` are what this process tells the others; the output has what any of them said.
        """
        assert [batch.virtual_rank for batch in batches] == list(self.virtual_ranks)
        assert all(batch.step == step for batch in batches)
        recipe, state, sums, schedule = self.recipe, self.state, self.sums, self.schedules.at(step)
        batches = [batch.to(self.device) for batch in batches]

        # 1. The teacher sees the unmasked global crops of all virtual ranks; its logits are kept.
        globals_nchw = [self._pixels(batch.globals_u8, batch.globals_photo) for batch in batches]
        with torch.no_grad():
            teacher = [self._teach(*pair) for pair in zip(globals_nchw, batches, strict=True)]

        # 2. Its outputs become targets by comparison with those of the global batch.
        with torch.no_grad():
            if state.center_2k is not None:
                bias_2k = center_bias(state.center_2k, schedule.teacher_temperature)
            else:
                bias_2k = sinkhorn_bias(
                    teacher, schedule.teacher_temperature, recipe.loss.sinkhorn_iterations, self.ranks
                )

        # 3. The student sees masked global and local crops, one virtual rank after the other. Every virtual rank has
        #    the same number of images, so the mean over the global batch is the mean over virtual ranks.
        sums.flat.zero_()
        for crops_nchw, batch, logits in zip(globals_nchw, batches, teacher, strict=True):
            losses = self._learn(crops_nchw, batch, logits, bias_2k, schedule.teacher_temperature)
            torch.autograd.backward(losses.total / recipe.virtual_ranks)
            sums.losses += torch.stack(losses).detach() / recipe.virtual_ranks
        if state.center_2k is not None:
            sums.logits_2k += logit_sums(teacher)
        told = (stop, checkpoint, busy, sum(batch.corrupt for batch in batches))
        for signal, value in zip(sums.signals, told, strict=True):
            signal.fill_(float(value))

        # 4. One sum over processes: gradients, losses, the teacher's logits, signals.
        self.ranks.sum(sums.flat)

        # 5. Student, teacher and centre move, all or none: a step that is not finite changes nothing.
        norms = clip(state.layout, sums.gradients, recipe.optim.clip_norm, recipe.optim.clip_by)
        finite = torch.stack([sums.losses.sum(), *norms.values()]).isfinite().all()
        state.adam.step(sums.gradients, schedule, finite)
        update_teacher(state.teacher_flat, state.student_flat, schedule.teacher_momentum, finite)
        if state.center_2k is not None:
            rows = [VIEWS * recipe.global_batch, recipe.virtual_ranks * len(batches[0].mask_indices)]
            mean_2k = torch.stack([sums.logits_2k[kind] / max(count, 1) for kind, count in enumerate(rows)])
            update_center(state.center_2k, mean_2k, recipe.loss.center_momentum, finite)

        return StepOutput(
            step=step,
            schedule=schedule,
            losses=Losses(*sums.losses.clone()),
            gradient_norms=norms,
            finite=finite,
            skipped=step + 1 - state.adam.steps_g[0],
            signals=Signals(*sums.signals.clone()),
        )

    def _teach(self, globals_nchw: Tensor, batch: MicroBatch) -> TeacherLogits:
        """The teacher's logits of one micro-batch: CLS tokens, and patches where the student sees masks."""
        with self._autocast():
            (features,) = self.state.teacher.backbone([globals_nchw])
            return TeacherLogits(*self.state.teacher.project(features.cls, _pick(features.patches, batch.mask_indices)))

    def _learn(
        self, globals_nchw: Tensor, batch: MicroBatch, teacher: TeacherLogits, bias_2k: Tensor, temperature: float
    ) -> Losses:
        """The student's losses on one micro-batch, each a mean over its images."""
        recipe, student = self.recipe, self.state.student
        crops: list[Tensor] = [globals_nchw]
        masks: list[Tensor | None] = [batch.masks]
        if recipe.crops.local_count:
            crops.append(self._pixels(batch.locals_u8, batch.locals_photo))
            masks.append(None)
        generator = drop_path_generator(recipe.seed, batch.step, batch.virtual_rank)
        with self._autocast():
            features = student.backbone(crops, masks, generator=generator)
            cls_nk, patches_mk = student.project(
                torch.cat([part.cls for part in features]), _pick(features[0].patches, batch.mask_indices)
            )

        cls_targets_nk = targets(teacher.cls_bk, bias_2k[0], temperature)
        patch_targets_mk = targets(teacher.patches_mk, bias_2k[1], temperature)
        dino = dino_loss(
            cls_nk.chunk(VIEWS + recipe.crops.local_count), cls_targets_nk.chunk(VIEWS), recipe.loss.student_temperature
        )
        ibot = ibot_loss(
            patches_mk,
            patch_targets_mk,
            batch.mask_weights,
            VIEWS * recipe.micro_batch,
            recipe.loss.student_temperature,
        )
        koleo = torch.stack([koleo_loss(view_bd) for view_bd in features[0].cls.chunk(VIEWS)]).sum()
        total = recipe.loss.dino * dino + recipe.loss.ibot * ibot + recipe.loss.koleo * koleo
        return Losses(total, dino, ibot, koleo, teacher_entropy(cls_targets_nk))

    def _pixels(self, crops_u8: Tensor, photo: Photometrics) -> Tensor:
        """Augmented and normalised crops, float32."""
        return apply(crops_u8, photo, self.data.mean, self.data.std)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def drop_path_generator(seed: int, step: int, virtual_rank: int) -> torch.Generator:
    """Where drop path of one micro-batch draws from: a function of the run's seed and the place in the run.

    It is on the CPU for every device, so that draws do not depend on the device.
    """
    (number,) = draws.raw(1, seed, "drop path", step, virtual_rank)
    return torch.Generator().manual_seed(int(number) >> 1)


def _pick(patches_npd: Tensor, indices_m: Tensor) -> Tensor:
    """The patches [m, d] at indices into all patches of all crops."""
    return patches_npd.flatten(0, 1).index_select(0, indices_m)
