"""`sonoforge serve`: read-only, only what it lists, and each page made once."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from browser import Browser, chromium
from report_material import commit, summary_of_three

from sonoforge_trainer.report import pages as pages_module
from sonoforge_trainer.report.catalogue import list_runs
from sonoforge_trainer.report.pages import Pages
from sonoforge_trainer.storage import Storage

TOKEN = "0123456789abcdef"


@dataclass
class Served:
    """A server process before a folder of runs."""

    process: subprocess.Popen[str]
    port: int

    def ask(self, method: str, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.putrequest(method, path, skip_host="Host" in headers)
            for name, value in headers.items():
                connection.putheader(name.replace("_", "-"), value)
            connection.endheaders()
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()


def start(*arguments: str) -> Served:
    command = [sys.executable, "-m", "sonoforge_trainer", "serve", *arguments, "--port=0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert line.startswith("http://127.0.0.1:"), process.communicate()
    return Served(process, int(line.strip().rstrip("/").rpartition(":")[2]))


def end(served: Served) -> str:
    served.process.send_signal(signal.SIGTERM)
    _, errors = served.process.communicate(timeout=30)
    assert served.process.returncode == 0
    return errors


def make_runs(root: Path) -> Path:
    """A folder with one run, `team/fetal`, and beside the folder a file that is nobody's business."""
    commit(summary_of_three(root), ("a", "a", "b"))
    folder = root / "runs" / "team" / "fetal"
    folder.mkdir(parents=True)
    for path in root.glob("step-*"):
        path.rename(folder / path.name)
    (root / "secret.txt").write_text("do not show")
    (root / "runs" / "note.txt").write_text("not a run")
    return root / "runs"


@pytest.fixture
def runs(tmp_path) -> Path:
    """The runs of one test, which may change them."""
    return make_runs(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """The runs of every test that only looks."""
    return make_runs(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def served(shared) -> Iterator[Served]:
    """One server for all who only look."""
    found = start(str(shared))
    yield found
    end(found)


@pytest.fixture
def changing(runs) -> Iterator[Served]:
    """A server before the runs of one test."""
    found = start(str(runs))
    yield found
    end(found)


def test_the_index_links_to_every_run_and_the_link_leads_to_its_page(served):
    status, headers, body = served.ask("GET", "/")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert '<a href="/run/team%2Ffetal">team/fetal</a>' in body.decode()
    status, _, page = served.ask("GET", "/run/team%2Ffetal")
    assert status == 200
    assert "0.750" in page.decode()
    assert page.count(b"<img") == 2, "pictures are read where the run is, not where it was made"


def test_runs_that_are_chosen_are_compared_on_one_page(changing, runs):
    (runs / "team" / "fetal").rename(runs / "one")
    shutil.copytree(runs / "one", runs / "two & three")
    status, _, index = changing.ask("GET", "/")
    assert (status, index.count(b'type="checkbox"')) == (200, 2)
    status, _, page = changing.ask("GET", "/compare?run=one&run=two%2520%26%2520three")
    assert status == 200
    rows = set(re.findall(r'<th scope="row">([^<]*: [a-z]+ checkpoint)<', page.decode()))
    assert rows == {"fetal u: last checkpoint", "fetal u (2): last checkpoint"}, "no summary says which is best"
    for query in (
        "",
        "run=",
        "run=one&run=none",
        "run=../secret.txt",
        "run=one" + "".join(f"&run={n}" for n in range(20)),
    ):
        assert changing.ask("GET", f"/compare?{query}")[0] == 404, query


@pytest.mark.skipif(chromium() is None, reason="no Chromium on PATH; Debian's package is called chromium")
def test_a_person_chooses_runs_and_compares_them_in_a_browser(changing, runs, tmp_path):
    for name in ("a & b", "c"):
        shutil.copytree(runs / "team" / "fetal", runs / "team" / name)
    here = f"http://127.0.0.1:{changing.port}"
    browser = Browser(tmp_path / "browser")
    try:
        browser.open(f"{here}/")
        assert browser.console == []
        assert browser.requests == [f"{here}/"]
        for box in (0, 1):
            browser.value(f"document.querySelectorAll('input')[{box}].click()")
        browser.follow("document.querySelector('button').click()")
        assert browser.value("location.pathname") == "/compare"
        assert browser.value("document.querySelectorAll('#scores, #comparison').length") == 2
        assert browser.console == []
        assert [url for url in browser.requests if not url.startswith((f"{here}/", "data:"))] == []
        browser.open(f"{here}/")
        browser.follow("document.querySelector('tbody a').click()")
        assert browser.value("location.pathname") == "/run/team%2Fa%2520%26%2520b"
        assert browser.value("document.querySelector('h1').textContent") == "fetal"
    finally:
        browser.close()


def test_only_get_and_head_are_answered(served):
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND", "TRACE"):
        status, headers, _ = served.ask(method, "/")
        assert (status, headers["Allow"]) == (405, "GET, HEAD"), method
    status, headers, body = served.ask("HEAD", "/")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) > 1000


@pytest.mark.parametrize(
    "path",
    [
        "/run/../../secret.txt",
        "/run/..%2F..%2Fsecret.txt",
        "/run/%2e%2e%2fsecret.txt",
        "/run/%2Fetc%2Fpasswd",
        "/run/team",
        "/run/note.txt",
        "/run/team%2Ffetal%00",
        "/run/team%252Ffetal",
        "/run/file:///etc/passwd",
        "//team/fetal",
        "/secret.txt",
        "/run/",
        "/compare",
        "/compare/team",
    ],
)
def test_nothing_but_what_is_listed_can_be_asked_for(served, path):
    status, _, body = served.ask("GET", path)
    assert status == 404
    assert b"do not show" not in body


def test_every_answer_says_what_a_browser_may_do_with_it(served):
    for path in ("/", "/run/team%2Ffetal", "/nothing", "/healthz"):
        _, headers, _ = served.ask("GET", path)
        assert headers["Content-Security-Policy"].startswith("default-src 'none'; style-src 'sha256-")
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert "Python" not in headers["Server"]


def test_a_page_that_has_not_changed_is_not_sent_again(changing, runs):
    _, first, _ = changing.ask("GET", "/run/team%2Ffetal")
    status, _, body = changing.ask("GET", "/run/team%2Ffetal", If_None_Match=first["ETag"])
    assert (status, body) == (304, b"")
    result = next(runs.rglob("eval/planes-*.json"))
    result.write_text(result.read_text() + " ")
    status, second, _ = changing.ask("GET", "/run/team%2Ffetal", If_None_Match=first["ETag"])
    assert status == 200
    assert second["ETag"] != first["ETag"]


def test_a_page_of_another_site_cannot_read_the_loopback_under_a_name_of_its_own(served):
    for host in ("evil.example", "evil.example:80", "[", "127.0.0.1.evil.example"):
        assert served.ask("GET", "/", Host=host)[0] == 421
    for host in ("localhost", "127.0.0.1", "[::1]", f"localhost:{served.port}"):
        assert served.ask("GET", "/", Host=host)[0] == 200


def test_with_a_token_file_every_request_needs_the_token_but_the_probe(runs, tmp_path):
    file = tmp_path / "token"
    file.write_text(TOKEN)
    served = start(str(runs), f"--token-file={file}")
    try:
        assert served.ask("GET", "/healthz")[0] == 200
        for given in ("", "Bearer wrong-wrong-wrong-wrong", TOKEN, f"Basic {TOKEN}"):
            status, headers, body = served.ask("GET", "/", Authorization=given)
            assert (status, headers["WWW-Authenticate"]) == (401, "Bearer"), given
            assert b"fetal" not in body
        assert served.ask("GET", "/", Authorization=f"Bearer {TOKEN}")[0] == 200
    finally:
        end(served)


def test_beyond_the_loopback_it_asks_for_a_token_or_for_the_word(runs):
    command = [sys.executable, "-m", "sonoforge_trainer", "serve", str(runs), "--host=0.0.0.0", "--port=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 64
    assert "--host: found 0.0.0.0, where others can reach it" in done.stderr
    assert "--open-to-all" in done.stderr


def test_looking_at_pages_writes_nothing(served, shared):
    def state():
        return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in shared.rglob("*") if p.is_file()}

    before = state()
    served.ask("GET", "/")
    served.ask("GET", "/run/team%2Ffetal")
    assert state() == before


def test_a_run_that_no_page_can_be_made_from_is_said_to_be_so(changing, runs):
    (runs / "team" / "fetal" / "summary.json").write_text("{}")
    assert changing.ask("GET", "/run/team%2Ffetal")[0] == 200, "a summary that does not fit is left out"
    for path in runs.rglob("manifest.json"):
        path.write_text("{}")
    status, headers, body = changing.ask("GET", "/run/team%2Ffetal")
    assert (status, b"manifest" in body) == (502, False)
    assert headers["Content-Type"].startswith("text/plain")


def test_a_page_is_made_once_for_what_it_is_made_from(runs, monkeypatch):
    made = []
    render = pages_module.render

    def counted(*arguments, **options):
        made.append(arguments)
        return render(*arguments, **options)

    monkeypatch.setattr(pages_module, "render", counted)
    pages = Pages(runs.as_uri(), Storage())
    first = pages.runs(["team/fetal"])
    assert pages.runs(["team/fetal"]) is first
    assert len(made) == 1
    metrics = next(runs.rglob("metrics.jsonl"))
    metrics.write_bytes(metrics.read_bytes())
    os.utime(metrics, ns=(1, 1))
    assert pages.runs(["team/fetal"]).digest != first.digest
    assert len(made) == 2


def test_old_pages_go_where_the_cache_is_full(runs, monkeypatch):
    monkeypatch.setattr(pages_module, "CACHE_BYTES", 1)
    pages = Pages(runs.as_uri(), Storage())
    for when in (1, 2, 3):
        os.utime(next(runs.rglob("metrics.jsonl")), ns=(when, when))
        assert pages.runs(["team/fetal"]).body
        assert len(pages._kept) == 1


def test_runs_of_a_bucket_are_listed_with_what_they_hold(runs, s3):
    for path in runs.rglob("*"):
        if path.is_file():
            s3.storage.write(f"{s3.uri}/{path.relative_to(runs)}", path.read_bytes())
    (found,) = list_runs(s3.uri, s3.storage)
    assert (found.path, found.checkpoints, found.newest_step, found.results) == ("team/fetal", 3, 20, 3)
    (alone,) = list_runs(found.uri, s3.storage)
    assert (alone.path, alone.link) == ("", "/run/")
    assert b"0.750" in Pages(s3.uri, s3.storage).runs(["team/fetal"]).body
    assert list_runs(f"{s3.uri}/nothing", s3.storage) == []


def test_a_run_without_a_committed_checkpoint_is_not_listed(runs):
    for path in runs.rglob("COMMIT"):
        path.unlink()
    assert list_runs(runs.as_uri(), Storage()) == []
    assert b"No run has committed a checkpoint" in Pages(runs.as_uri(), Storage()).index().body
