"""`sonoforge run job.yaml`: one PretrainJob on this machine, with the planning core of the operator."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

import click

from sonoforge_operator.api import JobFile, parse_job_file
from sonoforge_operator.display import Display, make_display, scores_table
from sonoforge_operator.local import LocalError, LocalPort, write_atomically
from sonoforge_operator.plan import plan
from sonoforge_operator.status import JobStatus, requests_of
from sonoforge_operator.summary import summarise
from sonoforge_trainer.contract import ContractError, ExitCode, Score, canonical_json


class _Told(Exception):  # noqa: N818 - not an error: somebody asked the runner to end
    """SIGINT or SIGTERM."""


@click.command(name="run", short_help="Run a PretrainJob on this machine.")
@click.argument("job_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--state",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the status, logs and the report; default runs/NAME.",
)
@click.option("--quiet", is_flag=True, help="JSON lines even on a terminal.")
def command(job_file: Path, state: Path | None, quiet: bool) -> None:
    """Run the PretrainJob of JOB_FILE on this machine: train, evaluate every checkpoint, write a report.

    A run that was interrupted in any way goes on where it was when the command is given again. Ctrl-C saves a
    checkpoint and stops.
    """
    file = parse_job_file(job_file.read_text(), where=str(job_file))
    folder = state or Path("runs") / file.job.metadata.name
    try:
        port = LocalPort(folder, file, local_uid(file))
    except LocalError as error:
        raise click.ClickException(str(error)) from None
    with make_display(file, quiet=quiet) as display:
        try:
            status = follow(port, display, job_file)
        except _Told:
            display.say("stopping: workers save a checkpoint; run the same command to continue")
            port.stop_everything()
            sys.exit(128 + signal.SIGINT)
    page = write_report(port, status)
    click.echo(scores_table(status, file.job.spec.evaluation.best_by))
    click.echo(f"report: {page}")
    sys.exit(ExitCode.OK if status.phase == "Succeeded" else ExitCode.FAILED)


def follow(port: LocalPort, display: Display, job_file: Path) -> JobStatus:
    """Observe, plan, record, apply, until the job is over. Returns the last status.

    The job file is read again when it changes: its mutable parts can be edited while the job runs.
    """
    told = False
    text = job_file.read_text()

    def tell(number: int, frame: FrameType | None) -> None:
        nonlocal told
        told = True

    before = {number: signal.signal(number, tell) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while True:
            text = _reread(port, display, job_file, text)
            now = time.time()
            decided = plan(port.file, port.observe(), now)
            port.record(decided.status, decided.events, now)
            display.show(decided, now)
            port.apply(decided)
            if told:
                raise _Told
            if decided.status.terminal and not port.observe().children:
                return decided.status
            time.sleep(min(decided.wake_after, 0.2 if decided.status.terminal else 1.0))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _reread(port: LocalPort, display: Display, job_file: Path, before: str) -> str:
    try:
        text = job_file.read_text()
    except OSError:
        return before  # moved or being replaced: what is running goes on
    if text != before:
        try:
            port.adopt(parse_job_file(text, where=str(job_file)))
        except ContractError as error:
            display.say(f"the changed job file is not used: {error}")
        else:
            display.say("the job file changed; going on with the new one")
    return text


def write_report(port: LocalPort, status: JobStatus) -> Path:
    """Write the HTML page of a job that is over; a page that is already right is left alone."""
    summary = port.folder / "summary.json"
    page = port.folder / "report.html"
    text = summarise(port.file, status, port.events(), measure_floors(port, status)).to_json()
    if not (page.exists() and summary.exists() and summary.read_text() == text):
        summary.write_text(text)
        command = ["report", "--summary", str(summary), "--output", str(page)]
        if subprocess.run([sys.executable, "-m", "sonoforge_trainer", *command], check=False).returncode:
            click.echo("the page could not be written; give the same command again to try once more", err=True)
    return page


def measure_floors(port: LocalPort, status: JobStatus) -> dict[str, Score]:
    """Scores of methods without learning on every evaluation set, measured once and kept; none without a checkpoint."""
    kept = port.folder / "floors.json"
    if not kept.exists() and status.checkpoints:
        found: dict[str, object] = {}
        for _, request in requests_of(status.checkpoints[0].ref, port.file.evaluations):
            done = subprocess.run(
                [sys.executable, "-m", "sonoforge_trainer", "eval", "--floors", "--request", "-"],
                input=request.to_json().encode(),
                stdout=subprocess.PIPE,
                check=False,
            )
            if done.returncode:
                click.echo(
                    f"the floors of {request.evaluation.name} could not be measured; the page leaves them out", err=True
                )
                return {}
            found |= json.loads(done.stdout)
        write_atomically(kept, canonical_json(found))
    if not kept.exists():
        return {}
    return {name: Score.parse(score, where=name) for name, score in json.loads(kept.read_text()).items()}


def local_uid(file: JobFile) -> str:
    """The identity of a job without a cluster: its name, where its checkpoints are, and what it trains."""
    job = file.job
    if job.metadata.uid:
        return job.metadata.uid
    identity = [job.metadata.name, job.spec.checkpoints.uri, job.spec.training.document()]
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:32]
