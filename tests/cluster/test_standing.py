"""What somebody deletes or edits of a job's standing objects is put right by the next comparison."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from operators import apply_crds, grant, own_namespace
from test_life import JOB

from sonoforge_operator.cluster.api_client import CONFIG_MAPS, POLICIES, STANDING, Api, Kind
from sonoforge_operator.cluster.coordinators import Coordinators
from sonoforge_operator.cluster.freshness import Freshness
from sonoforge_operator.cluster.jobs import Site
from sonoforge_operator.cluster.metrics import Metrics
from sonoforge_operator.cluster.names import Key
from sonoforge_operator.cluster.port import ClusterPort
from sonoforge_operator.cluster.reconciler import Reconciler
from sonoforge_operator.cluster.store import Store

OPEN = {"spec": {"ingress": [{}]}}
"""Lets everybody in."""


@pytest.fixture
def place(control_plane):
    apply_crds(control_plane)
    with own_namespace(control_plane, "standing") as namespace:
        control_plane.kubectl("apply", f"--namespace={namespace}", "--filename=-", stdin=JOB)
        yield namespace


def test_a_standing_object_that_is_edited_or_deleted_is_as_it_was_after_the_next_comparison(control_plane, place):
    def get(kind: str) -> dict[str, Any]:
        text = control_plane.kubectl(f"--namespace={place}", "get", kind, "-l", "sonoforge.dev/part", "-o", "json")
        return {item["metadata"]["name"]: item for item in json.loads(text)["items"]}

    async def story() -> None:
        store, metrics, woken = Store(), Metrics(), list[tuple[Kind, Key]]()
        async with (
            await Api.connect(str(grant(control_plane, place))) as api,
            Coordinators(b"a key of the tests, 32 bytes long", "http://127.0.0.1:9/{namespace}/{service}") as asked,
        ):
            port = ClusterPort(api, store, asked)
            site = Site(default_image="example.invalid/trainer:1", operator_namespace=place)
            reconciler = Reconciler(port, store, asked, site, metrics)
            freshness = Freshness(
                *(api, store, (place,), metrics, lambda kind, key: woken.append((kind, key))), steady=lambda: 0.0
            )
            await freshness.fill()
            await reconciler.reconcile(Key(place, "fetal"))
            policies, maps = get("networkpolicies"), get("configmaps")
            opened, deleted = sorted(policies)[0], next(iter(maps))
            assert [await freshness.compare(kind) for kind in STANDING] == [0, 0, 0, 0], "nothing is wrong yet"

            control_plane.kubectl(
                f"--namespace={place}", "patch", "networkpolicy", opened, "--type=merge", f"--patch={json.dumps(OPEN)}"
            )
            control_plane.kubectl(f"--namespace={place}", "delete", "configmap", deleted)
            assert sum([await freshness.compare(kind) for kind in STANDING]) == 2
            assert woken == [(CONFIG_MAPS, Key(place, deleted)), (POLICIES, Key(place, opened))]
            await reconciler.reconcile(Key(place, "fetal"))

            assert get("networkpolicies")[opened]["spec"] == policies[opened]["spec"]
            assert get("configmaps")[deleted]["data"] == maps[deleted]["data"]
            assert [await freshness.compare(kind) for kind in STANDING] == [0, 0, 0, 0], "and it stays so"

    asyncio.run(story())
