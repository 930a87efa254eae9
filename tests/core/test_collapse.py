"""When a run looks collapsed: only where nothing else can be the reason."""

from __future__ import annotations

import math

import pytest
from builders import World

from sonoforge_operator.rules import collapse
from sonoforge_trainer.contract import Progress, Score, Termination

PROTOTYPES = 65_536


def said(entropy: float | None) -> Progress:
    return Progress(teacher_entropy=entropy)


@pytest.mark.parametrize(
    ("entropy", "ranks", "found"),
    [
        (None, [], None),
        (None, [1.1], ""),
        (None, [1.1, 1.2], "RankMe"),
        (None, [1.1, 1.2, 1.6], ""),
        (None, [40.0, 1.2, 1.1], "RankMe"),
        (5.0, [1.2], ""),
        (0.02, [], ""),
        (0.0, [], "one prototype"),
        (math.log(PROTOTYPES), [30.0, 31.0], "all 65536 prototypes"),
        (math.log(PROTOTYPES) - 0.4, [], ""),
    ],
)
def test_collapse_is_certain_or_not_said(entropy, ranks, found):
    text = collapse(said(entropy), ranks, PROTOTYPES)
    assert text is None if found is None else bool(text) == bool(found) and found in text


def test_a_fresh_head_is_far_from_both_ends():
    """Logits of unit vectors in 256 dimensions, at the higher of the usual temperatures of a teacher."""
    import torch

    torch.manual_seed(0)
    features, prototypes = torch.randn(32, 256), torch.randn(4096, 256)
    logits = torch.nn.functional.normalize(features) @ torch.nn.functional.normalize(prototypes).T / 0.07
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1).mean().item()
    assert collapse(said(entropy), [], 4096) == ""
    assert math.log(4096) - entropy > 0.3


def scored(world: World, step: int, rank: float) -> None:
    """The run makes a checkpoint, and its evaluation ends with a RankMe."""
    steps = [c.ref.step for c in world.status.checkpoints]
    world.report(step, *steps, step)
    world.turn()
    world.turn()
    value = Score(value=rank).document()
    result = {"knn/f1_macro": {"value": 0.5}, "knn/val_f1_macro": {"value": 0.5}, "health/rankme": value}
    world.end("eval-", 0, Termination(cause="done", result=result))
    world.turn()


def test_a_run_whose_features_collapsed_says_so_and_trains_on():
    """What a fresh network has at step 0 is no collapse, and the condition goes once a checkpoint has more."""
    world = World()
    world.turn()
    assert shown(world) == ("Unknown", "NotMeasured")
    scored(world, 0, 1.0)
    scored(world, 10, 1.1)
    assert shown(world) == ("False", "Varied")
    scored(world, 20, 1.2)
    assert shown(world) == ("True", "AllAlike")
    assert world.status.phase == "Running"
    assert (world.status.attempt, world.status.outcome) == (1, None)
    scored(world, 30, 9.0)
    assert shown(world) == ("False", "Varied")


def test_a_run_whose_teacher_says_the_same_of_everything_says_so():
    world = World()
    world.turn()
    world.report(10, teacher_entropy=3.0)
    world.turn()
    assert shown(world) == ("False", "Varied")
    world.report(11, teacher_entropy=0.001)
    world.turn()
    assert shown(world) == ("True", "AllAlike")


def shown(world: World) -> tuple[str, str]:
    condition = world.status.condition("Collapsed")
    assert condition is not None
    return condition.status, condition.reason
