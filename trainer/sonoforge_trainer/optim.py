"""AdamW over flat parameters: groups with layer decay, clipping, a finite check without a host sync, teacher EMA.

The parameters of a network are views of one float32 tensor, in an order in which every module (backbone, each head)
and every update group is one slice. Gradients, moments and the teacher have the same layout. So a reduction over
processes is one call, a norm one kernel, an update one fused kernel for each group, and the teacher's average one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from sonoforge_trainer.contract.config import OptimConfig
from sonoforge_trainer.schedule import ScheduleValues

ALIGNMENT = 64
"""Elements of float32 that a parameter's place is a multiple of; 256 bytes suits every kernel."""

EPSILON = 1e-8
"""AdamW epsilon, as the reference."""

TOKENS = ("pos_embed", "cls_token", "mask_token", "register_tokens")
"""Parameters of the backbone that are embeddings themselves."""


class UpdateRule(NamedTuple):
    """How a parameter is updated; parameters of one module with the same rule form a group."""

    module: str
    """First part of the name: `backbone`, `dino_head` or `ibot_head`."""
    lr_factor: float
    """Multiplier of the learning rate."""
    decays: bool
    """Whether weight decay applies."""
    last_layer: bool
    """Whether it is a prototype layer, which starts frozen."""


def update_rule(name: str, optim: OptimConfig, depth: int) -> UpdateRule:
    """The rule of parameter `name` of a student whose backbone has `depth` blocks.

    The learning rate falls by `layer_decay` from block to block towards the input: with 12 blocks and 0.9 the tokens
    get 0.9^13 = .254, the patch embedding that times 0.2, block 0 gets .282, block 11 gets .9, final norm and heads 1.
    """
    module, _, rest = name.partition(".")
    factor = 1.0
    if module == "backbone":
        head, *more = rest.split(".")
        if head in TOKENS or head == "patch_embed":
            factor = optim.layer_decay ** (depth + 1)
        elif head == "blocks":
            factor = optim.layer_decay ** (depth - int(more[0]))
        if head == "patch_embed":
            factor *= optim.patch_embed_lr
    plain = name.endswith(".bias") or "norm" in rest or "gamma" in rest
    token = module == "backbone" and rest in TOKENS
    return UpdateRule(module, factor, not plain and (optim.decay_tokens or not token), "last_layer" in rest)


@dataclass(frozen=True)
class Layout:
    """Where each parameter lies in a flat tensor."""

    shapes: Mapping[str, torch.Size]
    """Shape of each parameter, in order of place."""
    offsets: Mapping[str, int]
    """First element of each parameter."""
    groups: tuple[tuple[slice, UpdateRule], ...]
    """Slices of the parameters that are updated alike."""
    modules: Mapping[str, slice]
    """Slice of each module."""
    size: int
    """Elements of a flat tensor, padding included; padding stays 0."""

    @classmethod
    def of(cls, parameters: Iterable[tuple[str, Tensor]], rule: Callable[[str], UpdateRule]) -> Layout:
        """Order parameters by module, as given, and inside a module by rule."""
        shapes = {name: parameter.shape for name, parameter in parameters}
        rules = {name: rule(name) for name in shapes}
        modules = list(dict.fromkeys(found.module for found in rules.values()))
        order = sorted(shapes, key=lambda name: (modules.index(rules[name].module), *rules[name][1:]))
        offsets, offset = {}, 0
        for name in order:
            offsets[name] = offset
            offset += -(-shapes[name].numel() // ALIGNMENT) * ALIGNMENT
        starts = [*offsets.values(), offset]
        ends = dict(zip(order, starts[1:], strict=True))

        def extent(names: list[str]) -> slice:
            return slice(offsets[names[0]], ends[names[-1]])

        return cls(
            shapes={name: shapes[name] for name in order},
            offsets=offsets,
            groups=tuple((extent(list(names)), key) for key, names in groupby(order, rules.__getitem__)),
            modules={key: extent(list(names)) for key, names in groupby(order, lambda name: rules[name].module)},
            size=offset,
        )

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The parameters inside a flat tensor, by name."""
        return {
            name: flat[offset : offset + self.shapes[name].numel()].view(self.shapes[name])
            for name, offset in self.offsets.items()
        }

    def adopt(self, module: nn.Module) -> Tensor:
        """Move the parameters of a module into a new flat tensor, of which they become views; returns it."""
        parameters = dict(module.named_parameters())
        flat = torch.zeros(self.size, device=next(iter(parameters.values())).device)
        for name, view in self.views(flat).items():
            view.copy_(parameters[name].detach())
            parameters[name].data = view
        return flat


class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101) whose step does nothing where gradients are not finite."""

    def __init__(self, layout: Layout, parameters: Tensor, optim: OptimConfig) -> None:
        """Moments for a flat parameter tensor."""
        self.layout = layout
        self.parameters = parameters
        self.first_moment = torch.zeros_like(parameters)
        self.second_moment = torch.zeros_like(parameters)
        self.steps_g = torch.zeros(len(layout.groups), device=parameters.device)
        """Updates made, once for each group because torch counts by tensor."""
        self._betas = optim.betas

    def step(self, gradients: Tensor, values: ScheduleValues, finite: Tensor) -> None:
        """Update the parameters from a flat gradient; where `finite` (a bool scalar) is false, change nothing.

        The flag stays on the device: the fused kernel reads it, as it does for a gradient scaler.
        """
        found_inf = (~finite).to(torch.float32)
        for (place, rule), steps in zip(self.layout.groups, self.steps_g, strict=True):
            adamw(
                [self.parameters[place]],
                [gradients[place]],
                [self.first_moment[place]],
                [self.second_moment[place]],
                [],
                [steps],
                fused=True,
                found_inf=found_inf,
                amsgrad=False,
                beta1=self._betas[0],
                beta2=self._betas[1],
                lr=rule.lr_factor * rate_of(rule, values),
                weight_decay=values.weight_decay if rule.decays else 0.0,
                eps=EPSILON,
                maximize=False,
            )


def rate_of(rule: UpdateRule, values: ScheduleValues) -> float:
    """The schedule's learning rate for parameters with this rule, before their factor."""
    if rule.module == "backbone":
        return values.backbone_lr
    return values.last_layer_lr if rule.last_layer else values.lr


def clip(layout: Layout, gradients: Tensor, limit: float, by: Literal["module", "global"]) -> dict[str, Tensor]:
    """Scale flat gradients down to a norm of `limit`, in place; returns the norms before, by module, as 0-d tensors.

    `module` limits each module on its own, as the reference does; `global` all together; a limit of 0 only measures.
    """
    norms = {name: flat_norm(gradients[place]) for name, place in layout.modules.items()}
    if limit:
        whole = torch.linalg.vector_norm(torch.stack(list(norms.values())))
        for name, place in layout.modules.items():
            norm = whole if by == "global" else norms[name]
            gradients[place] *= (limit / (norm + 1e-6)).clamp(max=1.0)
    return norms


def flat_norm(flat: Tensor) -> Tensor:
    """Euclidean norm of a slice of a flat tensor, as a float32 scalar.

    In two levels, because torch adds up float32 in one run on the CPU, which is off by 6e-4 at 16 M elements.
    """
    rows = torch.linalg.vector_norm(flat.view(-1, ALIGNMENT), dim=1)
    norm: Tensor = torch.linalg.vector_norm(rows, dtype=torch.float64)
    return norm.to(torch.float32)


def update_teacher(teacher: Tensor, student: Tensor, momentum: float, finite: Tensor) -> None:
    """Move the flat teacher to the flat student by 1 - momentum, in place, where `finite` (a bool scalar) holds."""
    teacher.lerp_(student, finite.to(torch.float32) * (1.0 - momentum))
