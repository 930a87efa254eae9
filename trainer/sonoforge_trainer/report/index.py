"""The list of runs, as a page."""

from __future__ import annotations

from collections.abc import Sequence

from sonoforge_trainer.report.catalogue import Listed
from sonoforge_trainer.report.templates import fill


def render_index(runs_uri: str, runs: Sequence[Listed]) -> str:
    """A table of the runs below a URI, each with a link to its page."""
    return fill("index.html.j2", runs_uri=runs_uri, runs=runs)
