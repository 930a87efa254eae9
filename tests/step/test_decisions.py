"""The table of decisions names tests that exist."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_every_decision_names_a_test_that_exists():
    text = (REPOSITORY / "docs/decisions-dinov2.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    missing = [f"{file}::{test}" for file, test in named if f"def {test}(" not in (REPOSITORY / file).read_text()]
    assert missing == []
    rows = re.findall(r"^\| (\d+) \|.*\|$", text, re.MULTILINE)
    assert rows == [str(number) for number in range(1, 18)]
    assert all("::test_" in row for row in re.findall(r"^\| \d+ \|.*$", text, re.MULTILINE))
