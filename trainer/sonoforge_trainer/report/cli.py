"""`sonoforge report`: write the page of one or several runs."""

from __future__ import annotations

from pathlib import Path

import click

from sonoforge_trainer.contract import ContractError, RunSummary
from sonoforge_trainer.report.page import render
from sonoforge_trainer.report.runs import SUMMARY, open_run
from sonoforge_trainer.storage import Storage, StorageError


@click.command(name="report", short_help="Write the HTML page of one or several runs.")
@click.argument("runs", nargs=-1)
@click.option(
    "--summary",
    "summaries",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A run's summary.json; the same as giving it as RUN.",
)
@click.option("--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="HTML file to write.")
@click.option("--best-by", help="Score to mark the best checkpoint by, where no summary says which it is.")
@click.option("--no-images", is_flag=True, help="Leave out every picture: the page then holds no pixel of the data.")
@click.option("--publish", is_flag=True, help="Also put the summaries beside the checkpoints, for `sonoforge serve`.")
def command(
    runs: tuple[str, ...],
    summaries: tuple[Path, ...],
    output: Path,
    best_by: str | None,
    no_images: bool,
    publish: bool,
) -> None:
    """Write one self-contained HTML page: a comparison, curves, pictures and events of one or several runs.

    RUN is the state folder of `sonoforge run` (or its summary.json), or the folder or URI of a run's checkpoints.
    The pictures show images of the data sets; --no-images leaves them out.

    Example: sonoforge report runs/demo s3://bucket/runs/other --output page.html
    """
    storage = Storage.from_env()
    places = [*runs, *map(str, summaries)]
    if not places:
        raise ContractError("RUN: none given. Allowed: a state folder, a summary.json, or the URI of checkpoints")
    try:
        found = [open_run(place, storage, best_by=best_by) for place in places]
        page = render(found, storage, images=not no_images)
    except StorageError as error:
        raise click.ClickException(str(error)) from None
    temporary = output.with_name(output.name + ".new")
    temporary.write_text(page)
    temporary.replace(output)
    if publish:
        try:
            for summary in found:
                put_summary(summary, storage)
        except StorageError as error:
            raise click.ClickException(f"the page is written, but a summary could not be kept: {error}") from None


def put_summary(summary: RunSummary, storage: Storage) -> None:
    """Keep a run's summary beside its checkpoints, where it says what storage alone does not: events and floors."""
    storage.write(f"{summary.checkpoints_uri.rstrip('/')}/{SUMMARY}", summary.to_json().encode())
