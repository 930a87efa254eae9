"""`sonoforge run job.yaml`: one PretrainJob on this machine, with the planning core of the operator."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Self

import click

from sonoforge_operator.api import JobFile, parse_job_file
from sonoforge_operator.display import Display, make_display
from sonoforge_operator.local import LocalError, LocalPort
from sonoforge_operator.observed import Plan
from sonoforge_operator.plan import plan
from sonoforge_operator.processes import write_atomically
from sonoforge_operator.scores import scores_table
from sonoforge_operator.status import JobStatus
from sonoforge_operator.summary import summarise
from sonoforge_trainer.contract import ContractError, ExitCode, canonical_json


class Told:
    """SIGINT and SIGTERM, while this is entered: the first asks the runner to end, a second one to hurry."""

    def __init__(self) -> None:
        self.times = 0
        self.number = signal.SIGINT

    @property
    def once(self) -> bool:
        """Whether somebody asked."""
        return self.times > 0

    def twice(self) -> bool:
        """Whether somebody asked again."""
        return self.times > 1

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._tell) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _tell(self, number: int, frame: FrameType | None) -> None:
        self.times += 1
        self.number = signal.Signals(number)


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
    checkpoint and stops; a second Ctrl-C stops without saving.
    """
    file = parse_job_file(job_file.read_text(), where=str(job_file))
    folder = state or Path("runs") / file.job.metadata.name
    try:
        port = LocalPort(folder, file, local_uid(file))
    except LocalError as error:
        raise click.ClickException(str(error)) from None
    with Told() as told, make_display(file, quiet=quiet) as display:
        for field in unread_fields(file):
            display.say(f"spec.{field} means nothing on one machine and is not used; a cluster reads it")
        status = follow(port, display, job_file, told)
        if not status.terminal:
            display.say("stopping: workers save a checkpoint; Ctrl-C again does not wait for it")
            stop(port, display, told)
            display.say("stopped; the same command goes on from there")
            sys.exit(128 + told.number)
    click.echo(scores_table(status, port.file.job.spec.evaluation.best_by))
    if status.outcome and status.phase == "Failed":
        click.echo(f"failed: {status.outcome.reason}: {status.outcome.message}")
        click.echo(f"logs: {folder / 'logs'}")
    page = write_report(port, status)
    click.echo(f"report: {page or 'could not be written; give the same command to try again'}")
    sys.exit(ExitCode.OK if status.phase == "Succeeded" else ExitCode.FAILED)


def unread_fields(file: JobFile) -> list[str]:
    """Fields of the job's spec that are given, and that only a cluster reads."""
    spec = file.job.spec
    given = {"queueName": spec.queue_name, "ttlAfterFinished": spec.ttl_after_finished}
    return [name for name, value in given.items() if value]


def follow(port: LocalPort, display: Display, job_file: Path, told: Told) -> JobStatus:
    """Observe, plan, record, apply, until the job is over or somebody asks to end. Returns the last status.

    The job file is read again when it changes: its mutable parts can be edited while the job runs.
    """
    text = job_file.read_text()
    while True:
        text = _reread(port, display, job_file, text)
        decided = _record_pass(port, display)
        if told.once and not decided.status.terminal:
            return decided.status
        port.apply(decided)
        if decided.status.terminal and not port.observe().children:
            return decided.status
        time.sleep(min(decided.wake_after, 0.2 if decided.status.terminal else 1.0))


def stop(port: LocalPort, display: Display, told: Told) -> None:
    """Stop every child. What the workers saved on leaving is taken over before the coordinator that knows it ends."""
    port.stop(workers_only=True, at_once=told.twice)
    _record_pass(port, display)
    port.stop(at_once=told.twice)


def _record_pass(port: LocalPort, display: Display) -> Plan:
    now = time.time()
    decided = plan(port.file, port.observe(), now)
    port.record(decided.status, decided.events, now)
    display.show(decided, now)
    return decided


def _reread(port: LocalPort, display: Display, job_file: Path, before: str) -> str:
    try:
        text = job_file.read_text()
    except (OSError, UnicodeDecodeError):
        return before  # moved or being replaced: what is running goes on
    if text != before:
        try:
            port.adopt(parse_job_file(text, where=str(job_file)))
        except ContractError as error:
            display.say(f"the changed job file is not used: {error}")
        else:
            display.say("the job file changed; going on with the new one")
    return text


def write_report(port: LocalPort, status: JobStatus) -> Path | None:
    """Write the HTML page of a job that is over; a page that is already right is left alone. None where it failed."""
    summary = port.folder / "summary.json"
    page = port.folder / "report.html"
    text = summarise(port.file, status, port.events()).to_json()
    if not (page.exists() and summary.exists() and summary.read_text() == text):
        page.unlink(missing_ok=True)  # a page beside another summary would look right the next time
        write_atomically(summary, text)
        command = ["report", "--summary", str(summary), "--output", str(page), "--publish"]
        subprocess.run([sys.executable, "-m", "sonoforge_trainer", *command], check=False)
    return page if page.exists() else None


def local_uid(file: JobFile) -> str:
    """The identity of a job without a cluster: its name, where its checkpoints are, and what it trains."""
    job = file.job
    if job.metadata.uid:
        return job.metadata.uid
    identity = [job.metadata.name, job.spec.checkpoints.uri, job.spec.training.document()]
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:32]
