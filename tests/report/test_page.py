"""The page of a run: one file, right numbers, nothing from outside."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from sonoforge_trainer.contract import RunEvent, Score
from sonoforge_trainer.report.page import render
from sonoforge_trainer.report.palette import DARK, LIGHT, contrast, pairs
from sonoforge_trainer.storage import Storage


class Page(HTMLParser):
    """Collects the tags of a page and checks that they are closed in order."""

    VOID = {"meta", "img", "br", "link"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, *names: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in names]


def page_of(*summaries, **options) -> str:
    return render(summaries, Storage.from_env(), **options)


def plain(text: str) -> str:
    """The text without tags, with single spaces."""
    return " ".join(re.sub(r"<[^>]+>", " ", text).split())


def test_the_page_needs_nothing_from_outside(summary):
    page = Page(page_of(summary))
    assert page.open == []
    links = [v for _, a in page.tags for k, v in a.items() if k in ("src", "href")]
    assert any(link.startswith("data:image/png;base64,") for link in links)
    assert all(link.startswith(("data:", "#")) for link in links)
    assert not {"script", "iframe", "object", "form"} & {tag for tag, _ in page.tags}


def test_no_element_has_a_style_of_its_own_or_a_handler_which_the_policy_would_refuse(summary):
    for _, attributes in Page(page_of(summary)).tags:
        assert not [name for name in attributes if name == "style" or name.startswith("on")]


def test_every_anchor_of_the_page_leads_somewhere(summary):
    page = Page(page_of(summary))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in page.all("a")} <= set(ids)
    labelled = {name for _, a in page.tags for name in (a.get("aria-labelledby") or "").split()}
    assert labelled <= set(ids)


def test_tables_have_captions_and_every_head_says_what_it_is_of(summary):
    text = page_of(summary)
    page = Page(text)
    assert text.count("<table") == text.count("<caption") > 3
    assert all(a.get("scope") in ("col", "row", "colgroup") for a in page.all("th"))
    assert all(a.get("alt") for a in page.all("img"))
    assert text.count('role="img"') == text.count("<desc>") > 2
    assert page.all("main")[0]["id"] == "main"
    assert page.all("a")[0] == {"class": "skip", "href": "#main"}
    assert all(a.get("tabindex") == "0" and a.get("aria-label") for a in page.all("div") if a.get("class") == "scroll")


def test_the_best_of_a_column_is_bold_and_says_so_to_who_cannot_see_it(summary):
    text = page_of(summary)
    assert '<span class="top">0.750<span class="hidden"> best</span></span>' in text
    assert "0.650 to 0.850" in text
    assert "raw pixels" in text


def test_the_page_says_that_the_best_was_chosen_on_validation_and_shows_by_what(summary):
    text = page_of(summary)
    assert "chosen on validation, by planes-knn/val_f1_macro; its test scores had no say" in text
    assert "best, chosen on validation" in text
    assert '<th scope="col">planes-knn/val_f1_macro</th>' in text
    assert "<td>0.8750</td>" in text


def test_a_choice_by_a_score_without_labels_is_not_said_to_be_on_validation(summary):
    checkpoints = tuple(
        c.model_copy(update={"scores": {"planes-health/rankme": Score(value=float(c.ref.step))}})
        for c in summary.checkpoints
    )
    text = page_of(summary.model_copy(update={"best_by": "planes-health/rankme", "checkpoints": checkpoints}))
    assert "chosen by planes-health/rankme, which needs no labels" in text
    assert "chosen on validation" not in text


def test_texts_are_escaped_wherever_they_come_from(summary):
    hostile = "<b onclick=x>\"'&"
    events = (RunEvent(time=1.0, reason="Resized", message=hostile, step=5),)
    floors = {f"{hostile}:planes-knn/f1_macro": Score(value=0.4)}
    changes = {"job": hostile, "message": hostile, "events": events, "floors": floors}
    text = page_of(summary.model_copy(update=changes))
    assert "<b onclick" not in text
    assert text.count("&lt;b onclick=x&gt;") >= 5
    assert Page(text).open == []


def test_a_result_that_is_gone_is_left_out_and_the_rest_is_shown(summary, tmp_path):
    assert len(Page(page_of(summary)).all("img")) == 3
    for path in tmp_path.glob("step-0000000010/*/eval/planes-*.json"):
        path.unlink()
    text = page_of(summary)
    assert len(Page(text).all("img")) == 2
    assert "0.750" in text, "its scores are in the summary"


def test_without_images_no_pixel_is_on_the_page_and_it_says_so(summary):
    text = page_of(summary, images=False)
    assert not Page(text).all("img")
    assert "data:image" not in text
    assert "holds no pixel of the data sets" in text


def test_a_page_with_images_says_that_it_holds_them(summary):
    assert "The pictures are images of the data sets: whoever has this file has them." in page_of(summary)


def test_pictures_that_are_no_png_are_not_embedded(summary, tmp_path):
    for path in tmp_path.rglob("pca.png"):
        path.write_bytes(b"<svg onload=alert(1)>")
    text = page_of(summary)
    assert not Page(text).all("img")
    assert "3 pictures were left out" in text


def test_runs_of_the_same_name_are_told_apart(summary):
    text = page_of(summary, summary.model_copy(update={"uid": "v"}), summary.model_copy(update={"uid": "v"}))
    found = plain(text)
    assert "fetal u, fetal v, fetal v (3)" in found
    assert {"fetal u: best checkpoint", "fetal v (3): best checkpoint"} <= set(
        re.findall(r"fetal [a-z]+(?: \(3\))?: best checkpoint", found)
    )


def test_a_run_without_its_configuration_has_a_page(summary):
    assert "<summary>Configuration</summary>" in page_of(summary)
    assert "<summary>Configuration</summary>" not in page_of(summary.model_copy(update={"training": None}))


def test_a_run_without_any_checkpoint_has_a_page(summary):
    text = page_of(summary.model_copy(update={"checkpoints": (), "floors": {}}))
    assert Page(text).open == []
    assert 'id="comparison"' not in text


def test_confusion_matrices_are_of_the_best_checkpoint(summary):
    found = plain(page_of(summary))
    assert "Test images of the best checkpoint (step 10)" in found
    assert "knn on planes: 4 test images, cls k=10 (selected on validation)" in found
    assert "femur 1 0 1.00 head 2 1 0.33" in found


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_all_that_meets_on_the_page_has_the_contrast_of_level_aa(palette):
    found = [(first, second, contrast(first, second), least) for first, second, least in pairs(palette)]
    assert len(found) > 30
    assert not [one for one in found if one[2] < one[3]]


def test_contrast_is_that_of_the_standard():
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
