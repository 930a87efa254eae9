"""Scores as text: a table for each evaluation, and what a live display shows of them."""

from __future__ import annotations

import io
import re

from rich.console import Console
from rich.table import Table

from sonoforge_operator.status import CheckpointStatus, JobStatus
from sonoforge_trainer.contract import selection_score, split_score

_HEADLINES = re.compile(r"(logreg_\d+shot_)?f1_macro|dice_foreground|rankme")


def score_names(status: JobStatus, best_by: str | None) -> list[str]:
    """The scores worth showing: one or few for each protocol, the one to be best by, and the one that decides."""
    known = {name for c in status.checkpoints for e in c.evaluations for name in e.scores}
    chosen = {best_by, selection_score(best_by)} if best_by else set()
    return sorted(name for name in known if name in chosen or _HEADLINES.fullmatch(split_score(name)[2]))


def best_words(best_by: str | None) -> str:
    """What to call the best checkpoint: by what it was chosen is part of it."""
    return "best" if best_by is None or selection_score(best_by) == best_by else "best on validation"


def score_cell(checkpoint: CheckpointStatus, name: str) -> str:
    """A score of a checkpoint, or where its evaluation stands."""
    score = checkpoint.score(name)
    if score is not None:
        return f"{score:.4f}"
    owner = next((e for e in checkpoint.evaluations if e.name == split_score(name)[0]), None)
    return owner.phase.lower() if owner and owner.phase != "Succeeded" else "–"


def shown_checkpoints(status: JobStatus, places: int) -> list[CheckpointStatus]:
    """At most so many checkpoints, oldest first: the first, the best, and the newest."""
    wanted = [*status.checkpoints[:1], *(c for c in status.checkpoints if c.best), *reversed(status.checkpoints)]
    ids = list(dict.fromkeys(c.ref.id for c in wanted))[: max(1, places)]
    return [c for c in status.checkpoints if c.ref.id in ids]


def scores_table(status: JobStatus, best_by: str | None, *, width: int = 120) -> str:
    """The scores of every checkpoint as text: a table for each evaluation, a row for each checkpoint and each floor."""
    screen = io.StringIO()
    console = Console(file=screen, width=width, color_system=None)
    names = score_names(status, best_by)
    for evaluation in dict.fromkeys(split_score(name)[0] for name in names):
        console.print(_table(status, [n for n in names if split_score(n)[0] == evaluation], best_by))
    return "\n".join(line.rstrip() for line in screen.getvalue().splitlines())


def _table(status: JobStatus, names: list[str], best_by: str | None) -> Table:
    evaluation = split_score(names[0])[0]
    table = Table(box=None, pad_edge=False, title=evaluation, title_justify="left", title_style="bold")
    for title in ("STEP", "SAMPLES"):
        table.add_column(title, justify="right", vertical="bottom", no_wrap=True)
    for name in names:
        _, protocol, metric = split_score(name)
        table.add_column(f"{protocol}\n{metric}", justify="right", overflow="fold")
    table.add_column("")
    for c in status.checkpoints:
        best = best_words(best_by) if c.best and best_by in names else ""
        table.add_row(str(c.ref.step), str(c.ref.samples), *(score_cell(c, n) for n in names), best)
    floors = {n: score for f in status.floors if f.name == evaluation for n, score in f.scores.items()}
    for floor in dict.fromkeys(name.partition(":")[0] for name in floors):
        found = [floors.get(f"{floor}:{name}") for name in names]
        if any(found):
            table.add_row("–", "–", *(f"{score.value:.4f}" if score else "–" for score in found), floor)
    return table
