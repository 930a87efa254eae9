"""What a person sees: a readable table of scores, and the state of a run on a terminal or as JSON lines."""

from __future__ import annotations

import io
import json

import pytest
from builders import World, job, said_scores
from rich.console import Console

from sonoforge_operator.display import JsonDisplay, TerminalDisplay, duration
from sonoforge_operator.scores import scores_table, shown_checkpoints
from sonoforge_operator.status import EvaluationStatus
from sonoforge_trainer.contract import Score


def evaluated() -> World:
    world = World()
    world.turn()
    world.report(20, 0, 10, loss=9.5, samples_per_second=64.0)
    for score, val in ((0.75, 0.125), (0.5, 0.625)):
        world.turn()
        world.end("eval-", 0, said_scores(score, val=val))
    world.turn()
    return world


def test_the_table_has_a_row_a_checkpoint_and_a_column_a_protocol():
    lines = [line.rstrip() for line in scores_table(evaluated().status, "planes-knn/f1_macro").splitlines()]
    assert [line.split() for line in lines] == [
        ["planes"],
        ["knn", "knn"],
        ["STEP", "SAMPLES", "f1_macro", "val_f1_macro"],
        ["0", "0", "0.7500", "0.1250"],
        ["10", "320", "0.5000", "0.6250", "best", "on", "validation"],
    ]


def test_a_score_without_labels_is_what_it_is_chosen_by():
    world = evaluated()
    scores = {"planes-health/rankme": Score(value=7.5)}
    (evaluation,) = world.status.checkpoints[1].evaluations
    checkpoint = world.status.checkpoints[1].model_copy(
        update={"evaluations": (evaluation.model_copy(update={"scores": scores}),)}
    )
    status = world.status.model_copy(update={"checkpoints": (checkpoint,)})
    assert scores_table(status, "planes-health/rankme").splitlines()[-1].split() == ["10", "320", "7.5000", "best"]


def test_a_score_that_is_not_there_yet_says_where_its_evaluation_stands():
    world = evaluated()
    world.report(40, 0, 10, 30)
    world.turn()
    assert scores_table(world.status, None).splitlines()[-1].split() == ["30", "960", "running"]


def test_json_lines_tell_events_and_progress(capsys):
    world = evaluated()
    with JsonDisplay(job()) as display:
        display.show(world.last, world.now)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["job"] for line in lines} == {"fetal"}
    assert lines[0]["event"] == "Evaluated"
    progress = lines[-1]
    wanted = {"event": "Progress", "step": 20, "steps": 100, "evaluated": 2, "secondsLeft": 40, "bestScore": 0.5}
    wanted["bestCompared"] = 0.625
    assert {name: progress[name] for name in wanted} == wanted


def test_a_terminal_shows_phase_progress_scores_and_events():
    world = evaluated()
    screen = io.StringIO()
    display = TerminalDisplay(job(), Console(file=screen, width=120, force_terminal=False))
    with display:
        display.show(world.last, world.now)
    text = screen.getvalue()
    for part in (
        "fetal  Running",
        "step 20 of 100",
        "loss 9.5",
        "40 s left",
        "0.5000",
        "NewBest",
        "best on validation 0.6250 at",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (61, "1 min"), (3599, "1 h 0 min"), (4800, "1 h 20 min"), (180_000, "2 d 2 h")],
)
def test_times_are_told_as_a_person_would(seconds, text):
    assert duration(seconds) == text


def test_a_narrow_terminal_shows_the_first_the_best_and_the_newest_checkpoints():
    world = World(file=job(evaluation=job().job.spec.evaluation.model_copy(update={"parallel": 9})))
    world.turn()
    world.report(60, 0, 10, 20, 30, 40, 50)
    world.turn()
    waiting = {c.evaluations[0].id: c.ref.step for c in world.status.checkpoints}
    for name in world.running("eval-"):
        world.end(name, 0, said_scores(0.9 if waiting[name.split("-")[1]] == 20 else 0.1))
    world.turn()
    assert [c.ref.step for c in shown_checkpoints(world.status, 4)] == [0, 20, 40, 50]
    assert [c.ref.step for c in shown_checkpoints(world.status, 0)] == [0]


def test_floors_are_rows_below_the_checkpoints():
    world = evaluated()
    floor = EvaluationStatus(
        name="planes", id="f", phase="Succeeded", scores={"hog:planes-knn/f1_macro": Score(value=0.3)}
    )
    status = world.status.model_copy(update={"floors": (floor,)})
    assert scores_table(status, None).splitlines()[-1].split() == ["–", "–", "0.3000", "hog"]
