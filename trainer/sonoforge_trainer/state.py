"""Everything a training run carries from step to step: student, teacher, centre and optimiser moments.

It is the same for any number of processes, and it is exactly what a checkpoint holds: flat tensors with stable names.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sonoforge_trainer.contract import ContractError, TrainConfig
from sonoforge_trainer.head import Head
from sonoforge_trainer.model import Backbone, initialise
from sonoforge_trainer.optim import AdamW, Layout, update_rule

CENTERS = ("dino", "ibot")
"""Rows of the centre."""

NAMED_KEYS = 5
"""Keys of each kind that an error lists."""


class Networks(nn.Module):
    """A backbone with its projection heads; student and teacher are one each."""

    def __init__(self, training: TrainConfig) -> None:
        super().__init__()
        self.backbone = Backbone(training.model, training.recipe.crops.global_size)
        self.dino_head = Head(self.backbone.embed_dim, training.recipe.head)
        self.ibot_head = None if training.recipe.head.shared else Head(self.backbone.embed_dim, training.recipe.head)

    def project(self, cls_nd: Tensor, patches_md: Tensor) -> tuple[Tensor, Tensor]:
        """Prototype logits [n, K] of CLS tokens and [m, K] of patches; a shared head sees both in one pass."""
        if self.ibot_head is None:
            logits_k = self.dino_head(torch.cat([cls_nd, patches_md]))
            return logits_k[: len(cls_nd)], logits_k[len(cls_nd) :]
        return self.dino_head(cls_nd), self.ibot_head(patches_md)


class TrainState:
    """Student and teacher networks, the centre, and AdamW; the initial one is a function of the configuration.

    Parameters of both networks are views of the flat tensors `student_flat` and `teacher_flat`, which share `layout`.
    """

    def __init__(self, training: TrainConfig, device: torch.device | str = "cpu") -> None:
        """The state before step 0: weights drawn from the recipe's seed, the teacher a copy of the student."""
        recipe = training.recipe
        self.student = Networks(training)
        initialise(self.student, recipe.seed)
        self.student.to(device).train()
        depth = self.student.backbone.depth
        self.layout = Layout.of(
            self.student.named_parameters(), lambda name: update_rule(name, recipe.optim, depth=depth)
        )
        self.student_flat = self.layout.adopt(self.student)
        self.teacher = Networks(training).to(device).eval().requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher_flat = self.layout.adopt(self.teacher)
        self.adam = AdamW(self.layout, self.student_flat, recipe.optim)
        self.center_2k = None
        """Moving average of the teacher's logits, one row for each of CENTERS; None with Sinkhorn-Knopp."""
        if recipe.loss.centering == "ema":
            self.center_2k = torch.zeros(len(CENTERS), recipe.head.prototypes, device=device)

    def start_from(self, backbone: Mapping[str, Tensor]) -> None:
        """Replace the backbones of student and teacher, before step 0; names as of `Backbone.state_dict`.

        The heads stay as they are: the teacher's are a copy of the student's. The tensors must fit: see `weights.fit`.
        """
        for networks in (self.student, self.teacher):
            own = dict(networks.backbone.named_parameters())
            assert own.keys() == backbone.keys()
            with torch.no_grad():
                for name, parameter in own.items():
                    assert parameter.shape == backbone[name].shape, name
                    parameter.copy_(backbone[name])

    def tensors(self) -> dict[str, Tensor]:
        """The whole state by name. The tensors share its memory: copy them before the next step.

        `student.NAME` and `teacher.NAME` for each parameter (`backbone.*`, `dino_head.*`, `ibot_head.*`), `adam.m.NAME`
        and `adam.v.NAME` for the moments, `adam.step` for the number of updates made, `center.dino`, `center.ibot`.
        """
        flats = {
            "student": self.student_flat,
            "teacher": self.teacher_flat,
            "adam.m": self.adam.first_moment,
            "adam.v": self.adam.second_moment,
        }
        named = {
            f"{kind}.{name}": view for kind, flat in flats.items() for name, view in self.layout.views(flat).items()
        }
        named["adam.step"] = self.adam.steps_g[0]
        if self.center_2k is not None:
            named |= {f"center.{name}": center_k for name, center_k in zip(CENTERS, self.center_2k, strict=True)}
        return named

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the whole state. Raises ContractError, before anything changes, where names or shapes differ."""
        own = self.tensors()
        faults = {
            "missing": sorted(own.keys() - tensors.keys()),
            "unexpected": sorted(tensors.keys() - own.keys()),
            "of another shape or type": [
                f"{name} ({_kind(tensors[name])}, want {_kind(tensor)})"
                for name, tensor in own.items()
                if name in tensors and _kind(tensors[name]) != _kind(tensor)
            ],
        }
        if any(faults.values()):
            found = "; ".join(
                f"{len(names)} {fault}: {', '.join(names[:NAMED_KEYS])}{', …' if len(names) > NAMED_KEYS else ''}"
                for fault, names in faults.items()
                if names
            )
            raise ContractError(
                f"the tensors do not fit this training configuration: {found}. "
                "Use the configuration that the checkpoint was written with, or start a new run"
            )
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        self.adam.steps_g.fill_(self.adam.steps_g[0])


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
