"""When to try again and how long to wait: a budget of attempts and seconds, and capped exponential back-off."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass


def _jitter(low: float, high: float) -> float:
    # Python's shared generator belongs to the training code; jitter must not move it.
    return random.SystemRandom().uniform(low, high)


@dataclass(frozen=True)
class Clock:
    """Time and chance, as arguments."""

    monotonic: Callable[[], float] = time.monotonic
    """Seconds, never going back."""
    wait: Callable[[threading.Event, float], bool] = threading.Event.wait
    """Wait that many seconds, or until the event is set; true when it was."""
    uniform: Callable[[float, float], float] = _jitter
    """A number between the two."""


@dataclass(frozen=True)
class RetryPolicy:
    """The budget of one request."""

    attempts: int
    """Failures in a row until it is given up."""
    seconds: float
    """Seconds from the first failure in a row until it is given up."""
    first_delay_seconds: float
    """Wait after the first failure; it doubles with every further one."""
    max_delay_seconds: float
    """Longest wait."""


class RetrySeries:
    """The failures of one request so far. Progress begins a new series, so a long read may fail often but not stay."""

    def __init__(self, policy: RetryPolicy, clock: Clock) -> None:
        self._policy = policy
        self._clock = clock
        self._in_a_row = 0
        self._began = 0.0
        self.failures = 0
        """Failures in all, also those before progress was made."""

    def failed(self) -> float | None:
        """Record a failure. Gives the seconds to wait before the next attempt, or None when the budget is spent."""
        now = self._clock.monotonic()
        if self._in_a_row == 0:
            self._began = now
        self._in_a_row += 1
        self.failures += 1
        # The exponent is bounded so that a large budget of attempts does not overflow.
        doubled = self._policy.first_delay_seconds * 2.0 ** min(self._in_a_row - 1, 60)
        delay = min(self._policy.max_delay_seconds, doubled) * self._clock.uniform(0.5, 1.0)
        if self._in_a_row >= self._policy.attempts or now + delay - self._began > self._policy.seconds:
            return None
        return delay

    def progressed(self) -> None:
        """Record that an attempt got further."""
        self._in_a_row = 0

    def spent(self) -> str:
        """What was spent, for a message."""
        seconds = self._clock.monotonic() - self._began
        return f"{self._in_a_row} failures in a row within {seconds:.1f} s"
