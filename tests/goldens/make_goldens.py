"""Make the golden values in this folder from lightly 1.6.0 (MIT), which is not a dependency of Sonoforge.

    uv venv lightly-venv && uv pip install --python lightly-venv lightly==1.6.0
    lightly-venv/bin/python tests/goldens/make_goldens.py

The numbers are committed, so this runs only to change them. Inputs are a closed formula, `wave`, and no random numbers,
so a test rebuilds them exactly: element i (row-major) is `scale * sin(0.37 * i * i + phase)`, computed in double
precision and rounded to single. lightly has no Sinkhorn-Knopp of DINOv2; that part follows the published algorithm
(arXiv 2304.07193, appendix; DINOv2's `sinkhorn_knopp_teacher`), written here in double precision.
"""

import json
import pathlib
import warnings

import torch
import torch.nn.functional as F
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
from lightly.models.modules.heads import DINOv2ProjectionHead

FOLDER = pathlib.Path(__file__).parent
FORMULA = "scale * sin(0.37 * i * i + phase), i row-major, in float64, rounded to float32"
STUDENT_TEMPERATURE = 0.1
TEACHER_TEMPERATURE = 0.05
CENTER_MOMENTUM = 0.9


def wave(shape, scale, phase):
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (scale * torch.sin(0.37 * index * index + phase)).float().reshape(shape)


def described(shape, scale, phase):
    return {"shape": list(shape), "scale": scale, "phase": phase}


def softmax_targets(teacher, center, temperature):
    return F.softmax((teacher.double() - center.double()) / temperature, dim=-1)


def dino():
    """Two steps, the centre moving after each, for two crop counts."""
    cases = []
    for batch, prototypes, global_crops, local_crops in ((4, 16, 2, 3), (3, 32, 2, 8), (5, 8, 2, 0)):
        loss_fn = DINOLoss(
            output_dim=prototypes,
            student_temp=STUDENT_TEMPERATURE,
            teacher_temp=TEACHER_TEMPERATURE,
            warmup_teacher_temp=TEACHER_TEMPERATURE,
            center_momentum=CENTER_MOMENTUM,
        )
        steps = []
        for step in range(2):
            teacher_of = ((global_crops, batch, prototypes), 0.5, 0.1 + step)
            student_of = ((global_crops + local_crops, batch, prototypes), 0.7, 0.2 + step)
            teacher, student = wave(*teacher_of), wave(*student_of).requires_grad_()
            targets = softmax_targets(teacher, loss_fn.center, TEACHER_TEMPERATURE)
            loss = loss_fn(list(teacher), list(student), teacher_temp=TEACHER_TEMPERATURE)
            loss.backward()
            steps.append(
                {
                    "teacher": described(*teacher_of),
                    "student": described(*student_of),
                    "targets_first_row": targets[0, 0].tolist(),
                    "loss": loss.item(),
                    "student_grad_norm": student.grad.norm().item(),
                    "center_after": loss_fn.center.flatten().tolist(),
                }
            )
        cases.append({"global_crops": global_crops, "local_crops": local_crops, "steps": steps})
    return {
        "student_temperature": STUDENT_TEMPERATURE,
        "teacher_temperature": TEACHER_TEMPERATURE,
        "center_momentum": CENTER_MOMENTUM,
        "cases": cases,
    }


def ibot():
    """Two steps over four global crops of 4 x 4 patches, one of which is not masked."""
    masked = [[0, 1, 4, 5, 6], [], [10, 11, 15], [2, 3, 6, 7, 8, 9, 12, 13]]
    mask = torch.zeros(4, 16, dtype=torch.bool)
    for crop, patches in enumerate(masked):
        mask[crop, patches] = True
    count, prototypes = int(mask.sum()), 24
    loss_fn = IBOTPatchLoss(
        output_dim=prototypes,
        teacher_temp=TEACHER_TEMPERATURE,
        student_temp=STUDENT_TEMPERATURE,
        center_momentum=CENTER_MOMENTUM,
    )
    steps = []
    for step in range(2):
        teacher_of, student_of = ((count, prototypes), 0.5, 0.3 + step), ((count, prototypes), 0.7, 0.4 + step)
        teacher, student = wave(*teacher_of), wave(*student_of).requires_grad_()
        targets = softmax_targets(teacher, loss_fn.center.value, TEACHER_TEMPERATURE)
        loss = loss_fn(teacher, student, mask.view(4, 4, 4), teacher_temp=TEACHER_TEMPERATURE)
        loss.backward()
        steps.append(
            {
                "teacher": described(*teacher_of),
                "student": described(*student_of),
                "targets_first_row": targets[0].tolist(),
                "loss": loss.item(),
                "student_grad_norm": student.grad.norm().item(),
                "center_after": loss_fn.center.value.flatten().tolist(),
            }
        )
    return {
        "student_temperature": STUDENT_TEMPERATURE,
        "teacher_temperature": TEACHER_TEMPERATURE,
        "center_momentum": CENTER_MOMENTUM,
        "crops": 4,
        "masked_patches": masked,
        "steps": steps,
    }


def koleo():
    """From well spread to nearly identical rows, as at initialisation."""
    cases = []
    for shape, scale, base in (((16, 8), 1.0, 0.0), ((32, 384), 2.0, 0.0), ((8, 64), 0.02, 1.0), ((1, 6), 1.0, 0.0)):
        features = (wave(shape, scale, 0.5) + base).requires_grad_()
        loss = KoLeoLoss()(features)
        loss.backward()
        cases.append(
            {
                "features": described(shape, scale, 0.5),
                "added": base,
                "loss": loss.item(),
                "grad_norm": features.grad.norm().item(),
            }
        )
    return {"cases": cases}


def sinkhorn_official(logits, temperature, iterations):
    q_kb = torch.exp(logits.double() / temperature).T
    prototypes, samples = q_kb.shape
    q_kb /= q_kb.sum()
    for _ in range(iterations):
        q_kb /= q_kb.sum(dim=1, keepdim=True)
        q_kb /= prototypes
        q_kb /= q_kb.sum(dim=0, keepdim=True)
        q_kb /= samples
    return (q_kb * samples).T


def sinkhorn():
    cases = []
    for shape, scale, temperature, iterations in (((8, 12), 1.0, 0.05, 3), ((6, 20), 3.0, 0.07, 3), ((10, 6), 1.0, 0.04, 1)):
        logits_of = (shape, scale, 0.6)
        targets = sinkhorn_official(wave(*logits_of), temperature, iterations)
        cases.append(
            {
                "logits": described(*logits_of),
                "temperature": temperature,
                "iterations": iterations,
                "targets": targets.tolist(),
            }
        )
    return {"cases": cases}


def head():
    """A small head whose parameters follow the formula too."""
    sizes = {"in_dim": 8, "hidden_dim": 16, "bottleneck_dim": 4, "prototypes": 12}
    module = DINOv2ProjectionHead(8, 16, 4, 12)
    parameters = {}
    with torch.no_grad():
        for number, (name, parameter) in enumerate(module.named_parameters()):
            formula = (tuple(parameter.shape), 0.4, 0.7 + number)
            parameter.copy_(wave(*formula))
            parameters[name.replace("layers.", "mlp.")] = described(*formula)
        inputs_of = ((5, 8), 1.5, 0.05)
        logits = module(wave(*inputs_of))
    return {"sizes": sizes, "parameters": parameters, "inputs": described(*inputs_of), "logits": logits.tolist()}


def main():
    warnings.filterwarnings("ignore", category=FutureWarning)  # lightly uses the deprecated weight_norm
    for make in (dino, ibot, koleo, sinkhorn, head):
        source = "published algorithm, float64" if make is sinkhorn else "lightly 1.6.0"
        document = {"source": source, "formula": FORMULA, **make()}
        (FOLDER / f"{make.__name__}.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
