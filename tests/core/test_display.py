"""What a person sees: a readable table of scores, and the state of a run on a terminal or as JSON lines."""

from __future__ import annotations

import io
import json

from builders import World, job, said_scores
from rich.console import Console

from sonoforge_operator.display import JsonDisplay, TerminalDisplay, scores_table


def evaluated() -> World:
    world = World()
    world.turn()
    world.report(20, 0, 10, loss=9.5, samples_per_second=64.0)
    for score in (0.25, 0.5):
        world.turn()
        world.end("eval-", 0, said_scores(score))
    world.turn()
    return world


def test_the_table_has_a_row_a_checkpoint_and_a_column_a_protocol():
    lines = [line.rstrip() for line in scores_table(evaluated().status, "planes-knn/f1_macro").splitlines()]
    assert [line.split() for line in lines] == [
        ["planes"],
        ["knn"],
        ["CHECKPOINT", "STEP", "SAMPLES", "f1_macro"],
        ["000000000000", "0", "0", "0.2500"],
        ["000000000000", "10", "320", "0.5000", "best"],
    ]


def test_a_score_that_is_not_there_yet_says_where_its_evaluation_stands():
    world = evaluated()
    world.report(40, 0, 10, 30)
    world.turn()
    assert scores_table(world.status, None).splitlines()[-1].split()[1:] == ["30", "960", "running"]


def test_json_lines_tell_events_and_progress(capsys):
    world = evaluated()
    with JsonDisplay(job()) as display:
        display.show(world.last, world.now)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["job"] for line in lines} == {"fetal"}
    assert lines[0]["event"] == "Evaluated"
    progress = lines[-1]
    assert (progress["event"], progress["step"], progress["evaluated"], progress["eta"]) == (
        "Progress",
        "20/100",
        2,
        "40s",
    )


def test_a_terminal_shows_phase_progress_scores_and_events():
    world = evaluated()
    screen = io.StringIO()
    display = TerminalDisplay(job(), Console(file=screen, width=120, force_terminal=False))
    with display:
        display.show(world.last, world.now)
    text = screen.getvalue()
    for part in ("fetal  Running", "step 20/100", "loss 9.5", "0.5000", "NewBest"):
        assert part in text, part
