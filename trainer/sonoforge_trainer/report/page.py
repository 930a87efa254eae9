"""From runs and what they left in storage to the report page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from sonoforge_trainer.contract import CheckpointSummary, RunSummary, is_validation_score, selection_score
from sonoforge_trainer.report.comparison import models_of, tables
from sonoforge_trainer.report.confusion import Confusion, confusions_of
from sonoforge_trainer.report.curves import is_headline, score_charts, training_charts
from sonoforge_trainer.report.data_sets import data_sets
from sonoforge_trainer.report.pictures import Pictures, pictures_of
from sonoforge_trainer.report.runs import Run, read_run
from sonoforge_trainer.report.significance import RESAMPLES
from sonoforge_trainer.report.templates import fill
from sonoforge_trainer.report.timeline import world_chart
from sonoforge_trainer.storage import Storage


@dataclass(frozen=True)
class RunView:
    """What the page says of one run."""

    run: Run
    deciding: str | None
    """The score that the best checkpoint was chosen by."""
    names: list[str]
    """Scores of the table of checkpoints."""
    world: str
    """Chart of processes and restarts."""
    charts: list[tuple[str, str]]
    """(title, SVG) of training."""
    confusions: list[Confusion]
    """Of the checkpoint that is shown."""
    shown: CheckpointSummary | None
    """The best checkpoint, or the last where none is best."""
    config: str
    """The configuration, as JSON; empty where it is not known."""

    @property
    def summary(self) -> RunSummary:
        """The run's summary."""
        return self.run.summary

    @property
    def evaluations(self) -> int:
        """Results that could be read."""
        return len(self.run.results)

    @property
    def feature_passes(self) -> int:
        """Passes over images that they cost."""
        return sum(one.result.feature_passes for one in self.run.results)


def render(summaries: Sequence[RunSummary], storage: Storage, *, images: bool = True) -> str:
    """The page of one or several runs as HTML.

    What cannot be read any more is left out and named in the log. Without `images` no pixel of the data set is in it.
    Runs of the same name are told apart by their uid or by a number.
    """
    runs = [read_run(summary, storage) for summary in _distinct(summaries)]
    pictures = pictures_of(runs, storage) if images else Pictures()
    charts = score_charts(runs)
    return fill(
        "page.html.j2",
        title=", ".join(run.name for run in runs),
        runs=[_view(run) for run in runs],
        tables=tables(models_of(runs), storage),
        resamples=RESAMPLES,
        score_charts=[(title, svg) for title, svg in charts if is_headline(title)],
        more_charts=[(title, svg) for title, svg in charts if not is_headline(title)],
        images=images,
        pictures=pictures,
        data_sets=data_sets((one.result for run in runs for one in run.results), storage),
    )


def deciding(summary: RunSummary) -> str | None:
    """The score that the best checkpoint was chosen by, or None where none was chosen."""
    if summary.best_by is None or not any(c.best for c in summary.checkpoints):
        return None
    return selection_score(summary.best_by)


def score_names(summary: RunSummary) -> list[str]:
    """Every score that any checkpoint has, without those on validation."""
    return sorted({name for c in summary.checkpoints for name in c.scores if not is_validation_score(name)})


def _view(run: Run) -> RunView:
    summary = run.summary
    scored = [c for c in summary.checkpoints if c.scores]
    shown = next((c for c in scored if c.best), scored[-1] if scored else None)
    return RunView(
        run=run,
        deciding=deciding(summary),
        names=_listed(summary),
        world=world_chart(run),
        charts=training_charts(run),
        confusions=confusions_of(run.results_of(shown)),
        shown=shown,
        config=json.dumps(summary.training.document(), indent=1) if summary.training else "",
    )


def _distinct(summaries: Sequence[RunSummary]) -> list[RunSummary]:
    """The runs with names that differ: those of the same name get the beginning of their uid, or a number."""
    names = [summary.job for summary in summaries]
    found: list[RunSummary] = []
    for number, summary in enumerate(summaries, start=1):
        name = summary.job if names.count(summary.job) == 1 else f"{summary.job} {summary.uid[:6]}"
        taken = {one.job for one in found}
        found.append(summary.model_copy(update={"job": name if name not in taken else f"{name} ({number})"}))
    return found


def _listed(summary: RunSummary) -> list[str]:
    """Headline scores for the table of checkpoints, with the one that decided so that the choice can be followed."""
    names, decided = score_names(summary), deciding(summary)
    shown = [name for name in names if is_headline(name)] or names
    asked = [name for name in (summary.best_by, decided) if name is not None]
    return sorted({*shown, *(name for name in asked if any(name in c.scores for c in summary.checkpoints))})
