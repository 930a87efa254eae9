"""The page of a run: one file, right numbers, nothing from outside."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sonoforge_trainer.contract import (
    CheckpointRef,
    CheckpointSummary,
    Evaluation,
    EvaluationRequest,
    EvaluationResult,
    RunEvent,
    RunSummary,
    Score,
    TrainConfig,
)
from sonoforge_trainer.report.charts import Series, line_chart, ticks
from sonoforge_trainer.report.page import comparison, metric_records, render, score_charts
from sonoforge_trainer.storage import Storage

SHA = "sha256:" + "cd" * 32
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c6360000000020001"
    "48afa4710000000049454e44ae426082"
)


class Page(HTMLParser):
    """Collects the tags of a page and checks that they are closed in order."""

    VOID = {"meta", "img", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.attributes.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def summary(tmp_path: Path) -> RunSummary:
    """A run of three checkpoints, with logs, results and pictures on disk."""
    checkpoints = []
    for step, score, val in ((0, 0.25, 0.125), (10, 0.75, 0.875), (20, 0.5, 0.625)):
        ref = CheckpointRef(
            step=step,
            samples=step * 32,
            uri=f"file://{tmp_path}/step-{step:010d}/attempt-a",
            manifest_digest=f"sha256:{step:064x}",
            created="",
        )
        folder = tmp_path / f"step-{step:010d}" / "attempt-a"
        (folder / "eval").mkdir(parents=True)
        lines = [
            json.dumps({"step": s, "samples": s * 32, "loss": 10.0 - s / 4, "loss_dino": 1.0, "lr": 0.1})
            for s in range(max(1, step - 10), step + 1)
        ]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n" if step else "")
        evaluation = Evaluation(name="planes", shards="file:///e/shards.json", protocols=("knn",))
        request = EvaluationRequest(
            checkpoint_uri=ref.uri, checkpoint_digest=ref.manifest_digest, evaluation=evaluation
        )
        result = EvaluationResult(
            request=request,
            step=step,
            samples=step * 32,
            dataset_digest=SHA,
            counts={"test": 4},
            scores={"knn/f1_macro": Score(value=score)},
            feature_passes=1,
            pictures=("pca.png",),
        )
        (folder / "eval" / "pca.png").write_bytes(PIXEL)
        Path(request.result_uri.removeprefix("file://")).write_text(result.to_json())
        checkpoints.append(
            CheckpointSummary(
                ref=ref,
                scores={
                    "planes-knn/f1_macro": Score(value=score, low=score - 0.1, high=score + 0.1),
                    "planes-knn/val_f1_macro": Score(value=val),
                },
                results=(request.result_uri,),
                best=step == 10,
            )
        )
    return RunSummary(
        job="fetal",
        uid="u",
        phase="Succeeded",
        training=TrainConfig.resolve({"data": {"shards": "file:///s/shards.json"}, "recipe": {"preset": "tiny"}}),
        checkpoints_uri=f"file://{tmp_path}",
        best_by="planes-knn/f1_macro",
        checkpoints=tuple(checkpoints),
        floors={"raw pixels:planes-knn/f1_macro": Score(value=0.4)},
        events=(RunEvent(time=1.0, reason="WorkerReplaced", message="<b>node 1</b>", warning=True),),
        restarts={"infrastructure": 2},
    )


def test_the_page_needs_nothing_from_outside(summary):
    page = Page(render(summary, Storage.from_env()))
    assert page.open == []
    links = [v for _, a in page.attributes for k, v in a.items() if k in ("src", "href")]
    assert links
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.attributes}


def test_the_margin_over_the_random_initialisation_is_shown(summary):
    (row,) = comparison(summary)
    assert row.margin == 0.25
    assert (row.random.value, row.last.value, row.best.value) == (0.25, 0.5, 0.75)
    text = render(summary, Storage.from_env())
    assert "+0.2500" in text
    assert "raw pixels 0.4000" in text


def test_the_page_says_that_the_best_was_chosen_on_validation_and_shows_by_what(summary):
    text = render(summary, Storage.from_env())
    assert "chosen on validation, by planes-knn/val_f1_macro; its test scores had no say" in text
    assert "best, chosen on validation" in text
    assert '<th scope="col">planes-knn/val_f1_macro</th>' in text
    assert "<td>0.8750</td>" in text


def test_a_choice_by_a_score_without_labels_is_not_said_to_be_on_validation(summary):
    checkpoints = tuple(
        c.model_copy(update={"scores": {"planes-health/rankme": Score(value=float(c.ref.step))}})
        for c in summary.checkpoints
    )
    changes = {"best_by": "planes-health/rankme", "checkpoints": checkpoints}
    text = render(summary.model_copy(update=changes), Storage.from_env())
    assert "chosen by planes-health/rankme, which needs no labels" in text
    assert "chosen on validation" not in text


def test_texts_are_escaped(summary):
    text = render(summary, Storage.from_env())
    assert "<b>node 1</b>" not in text
    assert "&lt;b&gt;node 1&lt;/b&gt;" in text


def test_each_step_of_the_log_is_there_once_also_after_retention_deleted_the_states(summary):
    records = metric_records(summary, Storage.from_env())
    assert [r["step"] for r in records] == list(range(1, 21))
    assert records[3]["loss"] == 9.0


def test_a_result_that_is_gone_is_left_out_and_the_rest_is_shown(summary, tmp_path):
    for path in tmp_path.glob("step-0000000010/*/eval/planes-*.json"):
        path.unlink()
    text = render(summary, Storage.from_env())
    assert text.count("<figure") == 2


def test_scores_are_drawn_against_samples_with_floors_as_lines(summary):
    ((title, svg),) = score_charts(summary)
    assert title == "planes: f1_macro"
    assert svg.count("<circle") == 3
    assert "knn on raw pixels" in svg
    assert svg.count('class="line series-0 dashed"') == 1
    assert "knn: 0.75 at 320" in svg


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


def test_neighbouring_ticks_have_different_labels():
    svg = line_chart("t", [Series("a", [(0, 5.54501), (1, 5.54507)])], x_label="x")
    labels = re.findall(r'text-anchor="end">([^<]+)<', svg)
    assert len(labels) == len(set(labels)) > 2
