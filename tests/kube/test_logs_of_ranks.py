"""Which rank of a run a line of a log is from."""

from __future__ import annotations

import pytest

from sonoforge_operator.cluster.plugin import _rank


@pytest.mark.parametrize(
    ("line", "rank"),
    [
        ('{"event": "step", "rank": 0}', 0),
        ('{"event": "step", "rank": 12}', 12),
        ('{"rank": "3"}', 3),
        ('{"event": "step"}', None),
        ('{"rank": null}', None),
        ('{"rank": -1}', None),
        ('{"rank": [1]}', None),
        ('{"rank": "²"}', None),
        ("[1, 2]", None),
        ("Traceback (most recent call last):", None),
        ("", None),
    ],
)
def test_a_line_says_its_rank_or_is_of_none(line, rank):
    assert _rank(line) == rank
