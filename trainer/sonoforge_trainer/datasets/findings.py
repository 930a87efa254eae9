"""What is looked for in a set, and what was found: counts only, so that a report can be shown to anyone."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Severity = Literal["note", "warning"]
"""note: handled, or harmless. warning: scores may mislead, or samples were left out."""


@dataclass(frozen=True)
class Check:
    """One thing that is known to go wrong."""

    code: str
    """Name in the data card, for example `rgba`."""
    severity: Severity
    """How bad it is where it is found."""
    sentence: str
    """What was found and what was done about it. It follows a count."""


@dataclass(frozen=True)
class Finding:
    """The outcome of a check."""

    check: Check
    count: int
    """How often; 0 is a check that found nothing."""

    @property
    def state(self) -> str:
        """`ok`, `note` or `warning`."""
        return self.check.severity if self.count else "ok"


class Findings:
    """Counts by check. Every check that a set has is listed, also where nothing was found. Safe in threads."""

    def __init__(self, checks: Iterable[Check]) -> None:
        self._checks = {check.code: check for check in checks}
        self._counts = dict.fromkeys(self._checks, 0)
        self._references: dict[str, list[str]] = {}
        self._lock = threading.Lock()

    def add(self, code: str, count: int = 1, references: Iterable[str] = ()) -> None:
        """Count something. `references` name samples and go to the private list only."""
        assert code in self._checks, f"{code} is no check of this set"
        with self._lock:
            self._counts[code] += count
            self._references.setdefault(code, []).extend(references)

    def __getitem__(self, code: str) -> int:
        return self._counts[code]

    def all(self) -> tuple[Finding, ...]:
        """Every check with its count, in the order of the checks."""
        return tuple(Finding(check, self._counts[code]) for code, check in self._checks.items())

    def references(self) -> list[tuple[str, str]]:
        """(code, name of a sample in the source), sorted. Names may identify patients."""
        return sorted((code, name) for code, names in self._references.items() for name in names)
