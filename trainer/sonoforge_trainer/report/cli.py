"""`sonoforge report`: write the page of a run."""

from __future__ import annotations

from pathlib import Path

import click

from sonoforge_trainer.contract import RunSummary
from sonoforge_trainer.report.page import render
from sonoforge_trainer.storage import Storage


@click.command(name="report", short_help="Write the HTML page of a run.")
@click.option(
    "--summary",
    "summary_file",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The run's summary.json.",
)
@click.option("--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="HTML file to write.")
def command(summary_file: Path, output: Path) -> None:
    """Write one self-contained HTML page: scores, curves, pictures and events of a run."""
    summary = RunSummary.from_json(summary_file.read_text(), where=str(summary_file))
    page = render(summary, Storage.from_env())
    temporary = output.with_name(output.name + ".new")
    temporary.write_text(page)
    temporary.replace(output)
