"""Charts as SVG."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from sonoforge_trainer.contract import RunEvent
from sonoforge_trainer.report.charts import Mark, Series, described, line_chart, ticks
from sonoforge_trainer.report.curves import score_charts
from sonoforge_trainer.report.runs import Run
from sonoforge_trainer.report.timeline import marks_of, world_chart


def test_scores_are_drawn_against_samples_with_floors_as_lines(summary):
    ((title, svg),) = score_charts([Run(summary, [], [])])
    assert title == "planes: f1_macro"
    assert svg.count("<circle") == 3
    assert "knn on raw pixels" in svg
    assert svg.count('<polyline class="line series-0 dashed"') == 1
    assert "knn: 0.75 at 320" in svg


def test_several_runs_share_a_chart_and_their_floors_are_drawn_once(summary):
    other = summary.model_copy(update={"job": "other"})
    ((_, svg),) = score_charts([Run(summary, [], []), Run(other, [], [])])
    assert svg.count("<polyline") == 3
    assert "fetal knn" in svg
    assert "other knn" in svg


def test_a_chart_breaks_its_line_where_a_value_is_not_finite():
    svg = line_chart("t", [Series("a", [(0, 1.0), (1, float("nan")), (2, 2.0), (3, 3.0)])], x_label="x")
    assert svg.count("<polyline") == 2
    assert line_chart("t", [Series("a", [(0, float("inf"))])], x_label="x") == ""


@pytest.mark.parametrize(
    ("low", "high", "want"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0.12, 0.18, [0.12, 0.14, 0.16, 0.18]), (5, 5, [4.5, 4.75, 5.0, 5.25, 5.5])],
)
def test_ticks_are_round_and_cover_the_range(low, high, want):
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    if low != high:
        assert found == pytest.approx(want)


def test_processes_are_counted_in_whole_numbers():
    assert ticks(1, 2, least_step=1.0) == [1.0, 2.0]
    assert ticks(0, 10, least_step=1.0) == [0, 2, 4, 6, 8, 10]
    assert ticks(2, 2, least_step=1.0) == [1.0, 2.0, 3.0]


def test_neighbouring_ticks_have_different_labels():
    svg = line_chart("t", [Series("a", [(0, 5.54501), (1, 5.54507)])], x_label="x")
    labels = re.findall(r'text-anchor="end">([^<]+)<', svg)
    assert len(labels) == len(set(labels)) > 2


def test_a_chart_is_told_in_words():
    text = described([Series("loss", [(0, 8.0), (10, 9.0), (20, 4.0)]), Series("floor", [(0, 2.0), (20, 2.0)])])
    assert text == "loss: from 8 to 4 at 20, between 4 and 9. floor: 2."


def test_interruptions_are_marked_where_they_were_and_commits_are_not(summary):
    events = (
        RunEvent(time=1, reason="WorkerReplaced", message="node 0 was lost", warning=True, step=5),
        RunEvent(time=2, reason="Resized", message="1 to 2 nodes", step=5),
        RunEvent(time=3, reason="Suspended", message="released", step=12),
        RunEvent(time=4, reason="CheckpointCommitted", message="step 10", step=10),
    )
    marks = marks_of(summary.model_copy(update={"events": events}))
    assert [(mark.x, mark.warning) for mark in marks] == [(160.0, True), (384.0, False)]
    assert "node 0 was lost" in marks[0].text
    assert "1 to 2 nodes" in marks[0].text


def test_the_number_of_processes_is_a_step_function_of_the_samples_seen(summary):
    records = [{"samples": s, "world_size": w} for s, w in ((160, 2), (320, 2), (480, 1), (640, 1))]
    svg = world_chart(Run(summary, records, []))
    (points,) = re.findall(r'<polyline [^>]*points="([^"]+)"', svg)
    corners = [tuple(map(float, pair.split(","))) for pair in points.split()]
    assert len(corners) == 6
    assert all(a[0] == b[0] or a[1] == b[1] for a, b in pairwise(corners))
    assert world_chart(Run(summary, [{"samples": 1}], [])) == ""


def test_a_mark_outside_the_axis_is_not_drawn():
    marks = [Mark(5, "inside"), Mark(50, "outside")]
    svg = line_chart("t", [Series("a", [(0, 1.0), (10, 2.0)])], x_label="x", marks=marks)
    assert "inside" in svg
    assert "outside" not in svg
