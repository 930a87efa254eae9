"""The step against a plain implementation of one big batch, and its promises about faults and the host."""

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from sonoforge_trainer.contract.config import ExecutionConfig
from sonoforge_trainer.photometric import apply
from sonoforge_trainer.ranks import Ranks
from sonoforge_trainer.state import Networks, TrainState
from sonoforge_trainer.step import Step, drop_path_generator

CPU = ExecutionConfig(device="cpu")


class PlainTraining:
    """DINOv2 on one big batch, without virtual ranks except for the groups of KoLeo, with torch's own optimiser."""

    def __init__(self, training, schedule):
        self.training, self.schedule, self.recipe = training, schedule, training.recipe
        initial = TrainState(training)
        self.student, self.teacher = Networks(training), Networks(training)
        self.student.load_state_dict(initial.student.state_dict())
        self.teacher.load_state_dict(initial.student.state_dict())
        self.center = {"dino": 0.0, "ibot": 0.0}
        self.optimiser = torch.optim.AdamW(
            [{"params": [parameter], "name": name} for name, parameter in self.student.named_parameters()]
        )

    def rates(self, name, values):
        depth, optim = self.training.model.depth, self.recipe.optim
        lr = 0.0 if "last_layer" in name and values.last_layer_lr == 0 else values.lr
        if any(token in name for token in ("pos_embed", "cls_token", "mask_token", "register_tokens", "patch_embed")):
            lr *= optim.layer_decay ** (depth + 1)
        if "patch_embed" in name:
            lr *= 0.2
        if ".blocks." in name:
            lr *= optim.layer_decay ** (depth - int(name.split(".")[2]))
        return lr, 0.0 if name.endswith("bias") or "norm" in name or "gamma" in name else values.weight_decay

    def targets(self, kind, logits, temperature):
        if self.recipe.loss.centering == "ema":
            result = ((logits - self.center[kind]) / temperature).softmax(-1)
            self.center[kind] = 0.9 * self.center[kind] + 0.1 * logits.mean(0)
            return result
        q = (logits.double() / temperature).exp().T
        for _ in range(3):
            q = q / q.sum(1, keepdim=True) / len(q)
            q = q / q.sum(0, keepdim=True) / q.shape[1]
        return (q * q.shape[1]).T.float()

    def koleo(self, cls):
        x = functional.normalize(cls, dim=-1)
        distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distances.detach().fill_diagonal_(9).argmin(1)
        return -((x - x[nearest] + 1e-8).norm(dim=1) + 1e-8).log().mean()

    def __call__(self, batches, step):
        values, recipe = self.schedule.at(step), self.recipe
        b, groups = recipe.micro_batch, len(batches)
        ibot_head = {net: net.ibot_head or net.dino_head for net in (self.student, self.teacher)}

        def images(kind):
            data = self.training.data
            crops = [apply(getattr(m, f"{kind}_u8"), getattr(m, f"{kind}_photo"), data.mean, data.std) for m in batches]
            # [crop][image of the global batch]
            return torch.stack(crops).unflatten(1, (-1, b)).transpose(0, 1).flatten(1, 2)

        views, small = images("globals"), images("locals")
        masks = torch.stack([m.masks for m in batches]).unflatten(1, (2, b)).transpose(0, 1).flatten(1, 2)

        with torch.no_grad():
            seen = [self.teacher.backbone([view])[0] for view in views]
            cls = torch.cat([self.teacher.dino_head(x.cls) for x in seen])
            patches = torch.cat([ibot_head[self.teacher](x.patches[m]) for x, m in zip(seen, masks, strict=True)])
            dino_targets = self.targets("dino", cls, values.teacher_temperature).chunk(2)
            ibot_targets = self.targets("ibot", patches, values.teacher_temperature)

        globals_ = [self.student.backbone([view], [mask])[0] for view, mask in zip(views, masks, strict=True)]
        logits = [self.student.dino_head(x.cls) for x in globals_]
        logits += [self.student.dino_head(self.student.backbone([crop])[0].cls) for crop in small]

        def entropy(target, logit):
            return -(target * (logit / 0.1).log_softmax(-1)).sum(-1)

        pairs = [(t, s) for t in range(2) for s in range(len(logits)) if t != s]
        dino = sum(entropy(dino_targets[t], logits[s]).mean() for t, s in pairs) / len(pairs)
        student_patches = torch.cat(
            [ibot_head[self.student](x.patches[m]) for x, m in zip(globals_, masks, strict=True)]
        )
        weights = torch.cat([(1 / m.sum(1, keepdim=True)).expand(m.shape)[m] for m in masks])
        ibot = (entropy(ibot_targets, student_patches) * weights).sum() / (2 * b * groups)
        koleo = sum(self.koleo(group) for x in globals_ for group in x.cls.split(b)) / groups
        loss = dino + ibot + 0.1 * koleo

        self.optimiser.zero_grad()
        loss.backward()
        norms = {
            name: torch.nn.utils.clip_grad_norm_(module.parameters(), 3.0).item()
            for name, module in self.student.named_children()
        }
        for group in self.optimiser.param_groups:
            group["lr"], group["weight_decay"] = self.rates(group["name"], values)
        self.optimiser.step()
        with torch.no_grad():
            for t, s in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                t.copy_(values.teacher_momentum * t + (1 - values.teacher_momentum) * s)
        return {"total": loss.item(), "dino": dino.item(), "ibot": ibot.item(), "koleo": koleo.item()}, norms


@pytest.mark.parametrize("variant", ["sinkhorn", "ema"])
def test_virtual_ranks_equal_one_big_batch(runs, variant):
    training = runs.config(variant, drop_path=0.0)
    state = TrainState(training)
    step = Step(training, state, Ranks.single(), CPU)
    plain = PlainTraining(training, step.schedules)
    for index in range(4):
        batches = runs.batches(training, index, range(4))
        report = step(batches, index).read()
        losses, norms = plain(batches, index)
        assert {name: report.losses[name] for name in losses} == pytest.approx(losses, rel=2e-6)
        assert report.gradient_norms == pytest.approx(norms, rel=2e-5)
    for networks, expected in ((state.student, plain.student), (state.teacher, plain.teacher)):
        for (name, parameter), (_, value) in zip(networks.named_parameters(), expected.named_parameters(), strict=True):
            difference = (parameter - value).abs()
            if name.endswith("attn.qkv.bias"):
                # No attention depends on the bias of keys: its gradient is rounding, which Adam scales up to a step.
                difference = difference.unflatten(0, (3, -1))[[0, 2]]
            assert difference.max() <= 5e-6, name


def test_a_state_is_a_function_of_its_configuration_and_its_teacher_is_the_student(runs):
    first, second = TrainState(runs.config()).tensors(), TrainState(runs.config()).tensors()
    other = TrainState(runs.config(seed=1)).tensors()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    weight = "backbone.blocks.0.attn.qkv.weight"
    assert not torch.equal(first[f"student.{weight}"], other[f"student.{weight}"])
    assert torch.equal(first[f"student.{weight}"], first[f"teacher.{weight}"])


def test_names_of_the_state_are_stable(runs):
    names = TrainState(runs.config("ema")).tensors().keys()
    assert {
        "student.backbone.cls_token",
        "teacher.backbone.blocks.1.mlp.fc2.bias",
        "student.dino_head.last_layer.weight_g",
        "adam.m.dino_head.mlp.0.weight",
        "adam.v.backbone.norm.weight",
        "adam.step",
        "center.dino",
        "center.ibot",
    } <= names
    assert not any("ibot_head" in name for name in names)
    separate = TrainState(runs.config("sinkhorn")).tensors().keys()
    assert "teacher.ibot_head.last_layer.weight_v" in separate
    assert "center.dino" not in separate


def test_a_loaded_state_goes_on_exactly(runs):
    training = runs.config("ema")
    straight = TrainState(training)
    step = Step(training, straight, Ranks.single(), CPU)
    for index in range(2):
        step(runs.batches(training, index, range(4)), index)
    saved = {name: tensor.clone() for name, tensor in straight.tensors().items()}
    step(runs.batches(training, 2, range(4)), 2)

    resumed = TrainState(training)
    resumed.load_tensors(saved)
    Step(training, resumed, Ranks.single(), CPU)(runs.batches(training, 2, range(4)), 2)

    expected = straight.tensors()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.tensors().items())
    assert expected["adam.step"] == 3


def test_loading_another_state_is_an_error_that_lists_keys_and_changes_nothing(runs):
    state = TrainState(runs.config("ema"))
    tensors = {name: tensor.clone() + 1 for name, tensor in state.tensors().items()}
    before = state.student_flat.clone()
    del tensors["adam.step"]
    tensors["center.gram"] = torch.zeros(3)
    tensors["center.dino"] = torch.zeros(7)
    with pytest.raises(ValueError, match="do not fit") as error:
        state.load_tensors(tensors)
    assert "1 missing: adam.step; 1 unexpected: center.gram" in str(error.value)
    assert "center.dino (float32[7], want float32[48])" in str(error.value)
    assert torch.equal(state.student_flat, before)


def test_drop_path_draws_depend_on_seed_step_and_virtual_rank_alone():
    def draw(*key):
        return torch.rand(4, generator=drop_path_generator(*key)).tolist()

    assert draw(0, 1, 2) == draw(0, 1, 2)
    assert len({tuple(draw(*key)) for key in [(0, 1, 2), (1, 1, 2), (0, 2, 2), (0, 1, 3), (0, 12, 0)]}) == 5


class NoHostReads(TorchDispatchMode):
    """Fails where a tensor's value, or a shape that depends on values, is asked for."""

    SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.SYNCS, f"{func} reads a value back to the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", ["sinkhorn", "ema"])
def test_a_step_reads_nothing_back_to_the_host(runs, variant):
    training = runs.config(variant)
    step = Step(training, TrainState(training), Ranks.single(), CPU)
    batches = runs.batches(training, 0, range(4))
    with NoHostReads():
        output = step(batches, 0)
    assert output.read().finite


@pytest.mark.parametrize("variant", ["sinkhorn", "ema"])
def test_bfloat16_stays_near_float32(runs, variant):
    training = runs.config(variant)
    batches = runs.batches(training, 0, range(4))
    reports = [
        Step(training, TrainState(training), Ranks.single(), ExecutionConfig(device="cpu", precision=precision))(
            batches, 0
        ).read()
        for precision in ("bf16", "fp32")
    ]
    half, full = (report.losses["total"] for report in reports)
    assert half == pytest.approx(full, rel=0.02)
    assert half != full


def test_a_run_without_local_crops_and_masks_is_allowed(runs):
    training = runs.config(
        "sinkhorn",
        crops={"globalSize": 32, "localSize": 16, "localCount": 0},
        masks={"probability": 0},
        loss={"centering": "sinkhorn", "ibot": 0},
    )
    batches = runs.batches(training, 0, range(4), masked=0)
    report = Step(training, TrainState(training), Ranks.single(), CPU)(batches, 0).read()
    assert report.finite
    assert report.losses["ibot"] == 0
