"""`sonoforge eval` as processes: exit codes, termination messages, kills and races."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pytest
import structlog
import torch
from click.testing import CliRunner
from evaluation_material import png, request_of, write_checkpoint

from sonoforge_trainer import termination
from sonoforge_trainer.contract import (
    ENV_TERMINATION_LOG,
    EvaluationResult,
    Score,
    Termination,
    selection_score,
)
from sonoforge_trainer.evaluate.cli import command, succeeded
from sonoforge_trainer.evaluate.run import evaluate
from sonoforge_trainer.redact import KeyHasher
from sonoforge_trainer.shards.build import BuildRule, DataSetCard, Rendered, build
from sonoforge_trainer.shards.plan import Placed
from sonoforge_trainer.shards.sources import Row

RUN = "from sonoforge_trainer.evaluate.cli import command; command()"


@pytest.fixture
def start(tmp_path):
    """Starts `sonoforge eval` with a termination log of its own; whatever still runs at the end is killed."""
    started = []

    def run(*arguments, log="termination.json"):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", ENV_TERMINATION_LOG: str(tmp_path / log)}
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, *map(str, arguments)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def request_file(tmp_path, checkpoint, phantoms):
    """A request for every protocol with enough resamples to be killed in."""
    request = request_of(
        checkpoint, phantoms, "knn", "linear", "logreg", "fewshot", "segment-probe", "health", bootstrap=300
    )
    path = tmp_path / "request.json"
    path.write_text(request.to_json())
    return request, path


def results_below(checkpoint):
    return sorted(Path(urlparse(checkpoint[0]).path).glob("eval/*.json"))


def wait_for(condition, process):
    deadline = time.monotonic() + 60
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_killed_evaluation_that_is_started_again_gives_the_same_numbers_and_one_result(
    start, request_file, tmp_path, checkpoint, phantoms, storage
):
    request, path = request_file
    folder = Path(urlparse(checkpoint[0]).path)
    killed = start("--request", path)
    wait_for(lambda: list(folder.glob("features-*.json")), killed)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, killed.stderr.read()
    assert results_below(checkpoint) == []
    again = start("--request", path)
    assert again.wait(120) == 0, again.stderr.read()
    (only,) = results_below(checkpoint)
    found = EvaluationResult.from_json(only.read_bytes())
    assert found.feature_passes == 0
    # The same weights, evaluated without being killed.
    unhurt = write_checkpoint(storage, (tmp_path / "unhurt").as_uri())
    changes = {"checkpoint_uri": unhurt[0], "checkpoint_digest": unhurt[1]}
    assert evaluate(request.model_copy(update=changes), storage, torch.device("cpu")).scores == found.scores


def test_two_processes_that_do_the_same_at_once_say_the_same_and_leave_one_result(start, request_file, checkpoint):
    _, path = request_file
    processes = [start("--request", path, log=f"{n}.json") for n in range(2)]
    answers = [process.communicate(timeout=180) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    assert len(results_below(checkpoint)) == 1
    folder = Path(urlparse(checkpoint[0]).path)
    assert len(list(folder.glob("features-*.safetensors"))) == 1


def test_the_termination_message_holds_the_scores(call, checkpoint, phantoms, tmp_path, monkeypatch):
    monkeypatch.setenv(ENV_TERMINATION_LOG, str(tmp_path / "termination.json"))
    result = call(checkpoint[0], "--shards", phantoms, "--protocols", "knn")
    assert result.exit_code == 0
    said = Termination.from_json((tmp_path / "termination.json").read_text())
    assert said.cause == "done"
    assert Score.parse(said.result["knn/f1_macro"]).value == json.loads(result.stdout)["knn/f1_macro"]["value"]


def test_sigterm_ends_with_143_and_says_so(start, request_file, checkpoint, tmp_path):
    _, path = request_file
    process = start("--request", path)
    folder = Path(urlparse(checkpoint[0]).path)
    wait_for(lambda: list(folder.glob("features-*")), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert Termination.from_json((tmp_path / "termination.json").read_text()).cause == "terminated"


@pytest.fixture
def call():
    """Calls the command in this process and puts back what it changes: logs and the handler of SIGTERM."""
    handler = signal.getsignal(signal.SIGTERM)
    yield lambda *arguments: CliRunner().invoke(command, [str(a) for a in arguments])
    signal.signal(signal.SIGTERM, handler)
    structlog.reset_defaults()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--protocols", "knn"], 64, "--shards: required"),
        (["--shards", "file:///nowhere/shards.json", "--protocols", "knnn"], 64, "found knnn. Allowed: knn, linear"),
        (["--shards", "file:///nowhere/shards.json"], 64, "give a CHECKPOINT_URI"),
        (["--shards", "file:///nowhere/shards.json", "--where", "scanner"], 64, "FIELD=VALUE"),
        (["file:///nowhere", "--shards", "file:///nowhere/shards.json"], 65, "nowhere"),
    ],
)
def test_faults_of_the_user_end_with_their_exit_code_and_one_line(call, arguments, code, message):
    result = call(*arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_damaged_checkpoint_ends_with_the_code_for_data(call, checkpoint, phantoms, tmp_path, monkeypatch):
    monkeypatch.setenv(ENV_TERMINATION_LOG, str(tmp_path / "termination.json"))
    teacher = Path(urlparse(checkpoint[0]).path) / "teacher.safetensors"
    teacher.write_bytes(teacher.read_bytes()[:-10])
    assert call(checkpoint[0], "--shards", phantoms).exit_code == 65
    assert Termination.from_json((tmp_path / "termination.json").read_text()).cause == "data"


def test_a_patient_leak_ends_with_the_code_for_data(call, checkpoint, tmp_path, storage):
    rows = [Row(n + 1, str(n), None, label="a", split=s, patient="p") for n, s in enumerate(["train", "test"])]
    build(
        [[Placed(row, n, n) for n, row in enumerate(rows)]],
        DataSetCard("leaky"),
        lambda row: Rendered(png(np.full((32, 32), row.number)), "png"),
        (tmp_path / "leaky").as_uri(),
        storage,
        KeyHasher(b"0" * 32),
        BuildRule(),
    )
    result = call(checkpoint[0], "--shards", (tmp_path / "leaky" / "shards.json").as_uri())
    assert result.exit_code == 65
    assert "1 patient is in more than one split" in result.stderr


def test_floors_need_no_checkpoint(call, phantoms):
    result = call("--floors", "--shards", phantoms, "--protocols", "knn", "--name", "set")
    assert result.exit_code == 0
    assert "hog:set-knn/f1_macro" in json.loads(result.stdout)


def with_validation(names):
    """Scores by these names on test, and where it has one the counterpart of each on validation."""
    score = Score(value=1 / 3, low=1 / 7, high=6 / 7)
    return dict.fromkeys(names, score) | {selection_score(n): Score(value=2 / 3) for n in names}


HEADLINES = [f"{p}/{m}" for p in ("knn", "linear", "logreg") for m in ("accuracy", "balanced_accuracy", "f1_macro")]


def test_many_scores_still_fit_into_a_termination_message():
    few = succeeded(with_validation(HEADLINES))
    assert few.result["knn/accuracy"] == {"value": 0.333333, "low": 0.142857, "high": 0.857143}
    more = succeeded(with_validation([*HEADLINES, *(f"fewshot/logreg_{n}shot_accuracy" for n in range(50))]))
    assert more.result["fewshot/logreg_49shot_accuracy"] == {"value": 0.333333}
    most = succeeded(with_validation([*HEADLINES, *(f"fewshot/logreg_{n}shot_accuracy" for n in range(400))]))
    assert set(with_validation(HEADLINES)) < set(most.result)
    for said in (few, more, most):
        assert len(said.to_json().encode()) <= termination.MAX_BYTES


def test_what_checkpoints_are_compared_by_is_never_left_out_of_a_termination_message():
    """A suite entry of every protocol with thirty shots: 490 few-shot scores on test and as many on validation."""
    metrics = ("accuracy", "balanced_accuracy", "f1_macro", "auroc_macro")
    names = [f"{p}/{m}" for p in ("knn", "linear", "logreg", "finetune") for m in metrics]
    names += [f"fewshot/{p}_{n}shot_{m}" for p in ("knn", "logreg") for n in range(1, 31) for m in metrics]
    overlaps = [f"{o}_{k}{s}" for o in ("dice", "iou") for k in ("mean", "foreground") for s in ("", "_per_image")]
    names += [f"{p}/{o}" for p in ("segment-probe", "segment") for o in overlaps]
    names += [f"segment/{n}shot_{o}" for n in range(1, 31) for o in overlaps]
    names += ["health/rankme", "health/teacher_entropy"]
    scores = with_validation(names)
    assert len(names) == 514
    for best_by in names:
        said = succeeded(scores, best_by)
        assert {best_by, selection_score(best_by)} <= said.result.keys(), best_by
        assert len(said.to_json().encode()) <= termination.MAX_BYTES
    for name in ("knn/auroc_macro", "finetune/f1_macro", "segment/dice_foreground", "health/rankme"):
        assert {name, selection_score(name)} <= succeeded(scores).result.keys()


def test_the_command_keeps_what_it_is_told_that_decides(call, checkpoint, phantoms, tmp_path, monkeypatch):
    """Forty shots of one patient or two make more scores than fit; the last one that is made decides."""
    monkeypatch.setenv(ENV_TERMINATION_LOG, str(tmp_path / "termination.json"))
    shots = tuple(range(1, 41))
    request = request_of(
        checkpoint, phantoms, "fewshot", "segment-probe", name="set", shots=shots, seeds=1, bootstrap=0
    )
    (tmp_path / "request.json").write_text(request.to_json())
    decides = "segment-probe/iou_mean_per_image"

    def said(*arguments):
        assert call("--request", tmp_path / "request.json", *arguments).exit_code == 0
        return Termination.from_json((tmp_path / "termination.json").read_text()).result

    assert selection_score(decides) not in said()
    assert {decides, selection_score(decides)} <= said("--best-by", f"set-{decides}").keys()
