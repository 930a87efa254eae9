"""What an earlier version of the operator remembered is read by this one. `record.json` is never written anew."""

from __future__ import annotations

import json
from pathlib import Path

from objects import file

from sonoforge_operator.cluster.record import recall, remember
from sonoforge_operator.observed import Observed
from sonoforge_operator.plan import plan

RECORD = json.loads((Path(__file__).parent / "record.json").read_text())


def test_a_record_of_an_earlier_version_is_read_and_a_pass_goes_on_from_it():
    status = recall({"metadata": {"name": "x", "uid": "u"}, "status": {"record": RECORD}}, [], file())
    assert (status.attempt, status.restarts, status.worker_deaths) == (1, {"infrastructure": 1}, (1, 0))
    assert status.worker_lost_created == ()
    again = remember(status)
    assert {name: again[name] for name in RECORD if name != "uid"} == {n: v for n, v in RECORD.items() if n != "uid"}
    decided = plan(file(), Observed(status), 1010.0)
    assert decided.status.restarts == {"infrastructure": 1}
    assert {child.kind for child in decided.children} == {"coordinator", "worker"}
