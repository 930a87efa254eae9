"""The page in a real browser: nothing from the network, no error, nothing cut off, usable without a mouse."""

from __future__ import annotations

import base64
import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import Browser, chromium
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluate"))  # for evaluation_material.py; tests are no package

from evaluation_material import write_checkpoint

from sonoforge_trainer.contract import (
    CheckpointRef,
    CheckpointSummary,
    Evaluation,
    EvaluationRequest,
    RunEvent,
    RunSummary,
    Score,
    TrainConfig,
)
from sonoforge_trainer.evaluate.floors import floors
from sonoforge_trainer.evaluate.run import evaluate
from sonoforge_trainer.report.page import render
from sonoforge_trainer.report.palette import DARK, LIGHT, contrast
from sonoforge_trainer.shards.phantoms import PhantomRule
from sonoforge_trainer.shards.plan import PlanRule
from sonoforge_trainer.shards.synth import build_phantoms
from sonoforge_trainer.storage import Storage

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium on PATH; Debian's package is called chromium")
SCREENSHOTS = os.environ.get("SONOFORGE_SCREENSHOTS")
"""A folder to leave pictures of the page in, for a person to look at."""

VIEWS = {
    "light wide": {"width": 1280},
    "light narrow": {"width": 400},
    "dark wide": {"width": 1280, "dark": True},
    "dark narrow": {"width": 400, "dark": True},
    "print wide": {"width": 1050, "media": "print"},
    "print narrow": {"width": 720, "media": "print", "dark": True},
}


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    """URL of the page of a run of three really evaluated checkpoints, with every section."""
    torch.set_num_threads(1)
    folder, storage = tmp_path_factory.mktemp("page"), Storage()
    shards = f"{(folder / 'set').as_uri()}"
    build_phantoms(shards, PhantomRule(144, size=48, frames=1, clips=6), PlanRule(100, 0, (0.5, 0.25, 0.25)), storage)
    evaluation = Evaluation(
        name="phantoms",
        shards=f"{shards}/shards.json",
        protocols=("knn", "logreg", "fewshot", "segment-probe", "health"),
        bootstrap=50,
        shots=(1, 2),
        k=(5, 10),
    )
    checkpoints = []
    for step in (0, 20, 40):
        log = "".join(
            f'{{"step": {s}, "samples": {32 * s}, "loss": {9 - s / 20}, "loss_dino": {7 - s / 20}, "lr": 0.001, '
            f'"teacher_entropy": {5 + s / 50}, "world_size": {1 if 24 < s < 30 else 2}}}\n'
            for s in range(step - 19, step + 1)
            if step
        )
        uri, digest = write_checkpoint(
            storage, (folder / "run").as_uri(), step=step, seed=step, metrics=log.encode(), samples=step * 32
        )
        result = evaluate(
            EvaluationRequest(checkpoint_uri=uri, checkpoint_digest=digest, evaluation=evaluation),
            storage,
            torch.device("cpu"),
        )
        scores: dict[str, Score] = {f"phantoms-{name}": score for name, score in result.scores.items()}
        ref = CheckpointRef(step=step, samples=step * 32, uri=uri, manifest_digest=digest, created="")
        checkpoints.append(
            CheckpointSummary(ref=ref, scores=scores, results=(result.request.result_uri,), best=step == 20)
        )
    summary = RunSummary(
        job="a-run-with-a-name-that-is-as-long-as-names-of-jobs-may-become-in-practice",
        uid="u",
        phase="Succeeded",
        message="40 steps done",
        training=TrainConfig.resolve({"data": {"shards": "file:///s/shards.json"}, "recipe": {"preset": "tiny"}}),
        checkpoints_uri=(folder / "run").as_uri(),
        best_by="phantoms-knn/f1_macro",
        checkpoints=tuple(checkpoints),
        floors=floors(evaluation, storage),
        events=(
            RunEvent(time=1e9, reason="Accepted", message="40 steps of 32 images"),
            RunEvent(time=1e9 + 60, reason="WorkerReplaced", message="node 0 was lost", warning=True, step=24),
            RunEvent(time=1e9 + 90, reason="Resized", message="1 to 2 nodes of 1 processes", step=30, world_size=2),
        ),
        restarts={"infrastructure": 1},
        started=1e9,
        finished=1e9 + 600,
    )
    path = folder / "page.html"
    path.write_text(render([summary], storage))
    return path.as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Browser(tmp_path_factory.mktemp("browser"))
    yield found
    found.close()


@pytest.mark.parametrize("view", VIEWS)
def test_the_page_fits_in_every_view_and_asks_for_nothing(browser, page, view):
    options = VIEWS[view]
    browser.look(**options)
    browser.open(page)
    assert browser.console == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [page]
    browser.value("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.value("document.documentElement.scrollWidth") <= options["width"]
    assert browser.value("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    browser.value("document.querySelectorAll('details').forEach((d, i) => d.open = i == 1)")
    shot = browser.picture()
    with Image.open(io.BytesIO(shot)) as picture:
        assert picture.width == options["width"]
        corner = np.asarray(picture.convert("RGB"))[2, 2]
    paper = DARK if options.get("dark") and not options.get("media") else LIGHT
    assert "#" + "".join(f"{c:02x}" for c in corner) == paper["back"]
    if SCREENSHOTS:
        Path(SCREENSHOTS, f"{view.replace(' ', '-')}.png").write_bytes(shot)


def test_every_section_of_the_page_is_there(browser, page):
    browser.open(page)
    found = browser.value("[...document.querySelectorAll('h2')].map(h => h.id)")
    assert found == ["comparison", "scores", "run-1", "overlays", "neighbours", "patches", "data"]
    assert browser.value("document.querySelectorAll('table.matrix').length") == 2
    assert browser.value("document.querySelectorAll('#overlays ~ .cards img').length") == 3


def test_the_first_stop_of_the_keyboard_leads_to_the_content_and_focus_is_seen(browser, page):
    browser.look(width=1280)
    browser.open(page)
    browser.press("Tab", 9)
    assert browser.value("document.activeElement.textContent") == "Skip to the content"
    assert browser.value("document.activeElement.getBoundingClientRect().left") >= 0
    outlines, names = set(), []
    for _ in range(14):
        browser.press("Tab", 9)
        names.append(browser.value("document.activeElement.tagName + ' ' + document.activeElement.className"))
        outlines.add(browser.value("getComputedStyle(document.activeElement).outlineStyle"))
    assert outlines == {"solid"}
    assert {"A ", "DIV scroll", "SUMMARY "} <= set(names)


def test_a_screen_reader_finds_names_for_all_it_is_told_of(browser, page):
    browser.open(page)
    nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
    told = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n["ignored"]]
    roles = {role for role, _ in told}
    assert {"main", "navigation", "table", "columnheader", "rowheader", "image", "figure", "region", "link"} <= roles
    for role in ("table", "image", "region", "link", "heading", "columnheader", "rowheader"):
        assert all(name.strip() for one, name in told if one == role), role


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_texts_as_they_are_shown_have_the_contrast_of_level_aa(browser, page, dark):
    """Computed from what the browser shows, where the palette's test computes it from what should be shown."""
    browser.look(width=1280, dark=dark)
    browser.open(page)
    browser.value("document.querySelectorAll('details').forEach(d => d.open = true)")
    seen = browser.value(
        """(() => {
          const ground = e => { for (; e; e = e.parentElement) {
            const c = getComputedStyle(e).backgroundColor; if (c != 'rgba(0, 0, 0, 0)') return c; } return 'none'; };
          const pairs = new Set();
          for (const e of document.querySelectorAll('body *')) {
            const own = [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim());
            if (!own || e.closest('svg')) continue;
            pairs.add(getComputedStyle(e).color + '|' + ground(e)); }
          return [...pairs]; })()"""
    )

    def hexadecimal(colour: str) -> str:
        return "#" + "".join(f"{int(c):02x}" for c in colour.removeprefix("rgb(").rstrip(")").split(","))

    assert len(seen) >= 8
    for pair in seen:
        text, ground = pair.split("|")
        assert contrast(hexadecimal(text), hexadecimal(ground)) >= 4.5, pair


def test_the_page_prints_to_paper(browser, page):
    browser.look(width=1050)
    browser.open(page)
    printed = browser.send("Page.printToPDF", printBackground=False, paperWidth=8.27, paperHeight=11.69)
    data = base64.b64decode(printed["data"])
    assert data.startswith(b"%PDF")
    assert 2 <= data.count(b"/Type /Page\n") + data.count(b"/Type /Page ") + data.count(b"/Type/Page/") <= 20
