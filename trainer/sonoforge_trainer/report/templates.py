"""What the pages share: templates, the style sheet with the colours of the palette, and the policy of their content."""

from __future__ import annotations

import base64
import hashlib
import time
from importlib import resources

import jinja2

from sonoforge_trainer.contract import RunEvent, RunSummary
from sonoforge_trainer.report.palette import DARK, HEAT, LIGHT, SERIES, variables

_EVENTS_SHOWN = 500
"""Events of one run on the page, the newest; the summary has all."""


def fill(template: str, **values: object) -> str:
    """A page from its template, with the style sheet and the policy that allows it."""
    return _environment().get_template(template).render(style=style_sheet(), policy=content_policy(), **values)


def style_sheet() -> str:
    """The style sheet of every page."""
    template = _environment().get_template("style.css.j2")
    return template.render(light=variables(LIGHT), dark=variables(DARK), series=range(SERIES), heat=range(HEAT + 1))


def content_policy() -> str:
    """The pages' Content-Security-Policy: their style sheet by digest, embedded pictures, and nothing else.

    A form may only lead back to where the page came from; a file has none.
    """
    digest = base64.b64encode(hashlib.sha256(style_sheet().encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'self'"


def _environment() -> jinja2.Environment:
    loader = jinja2.FunctionLoader(lambda name: resources.files(__package__).joinpath(name).read_text())
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"stamp": _stamp, "events": _events, "digits": _digits}
    return environment


def _events(summary: RunSummary) -> list[RunEvent]:
    return list(summary.events[-_EVENTS_SHOWN:])


def _stamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds)) if seconds else "–"


def _digits(value: float) -> str:
    """A score with three decimals, or fewer where it is large: RankMe is not between 0 and 1."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
