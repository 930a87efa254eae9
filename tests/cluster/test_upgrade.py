"""A newer operator and newer CRDs: what runs goes on undisturbed, what was written before is still served."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from operators import ROOT, apply_crds
from sites import Site, job, open_site

CRD = ROOT / "manifests" / "crds" / "pretrainjobs.yaml"


@pytest.fixture
def site(control_plane, api_client, nodes, tmp_path) -> Iterator[Site]:
    with open_site(control_plane, api_client, tmp_path, "upgrade") as opened:
        yield opened


@pytest.fixture
def older_crd(control_plane) -> Iterator[dict[str, Any]]:
    """The CRD as if two fields of the spec and one of the status were not invented yet."""
    older = copy.deepcopy(yaml.safe_load(CRD.read_text()))
    properties = older["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    for part, field in (("spec", "ttlAfterFinished"), ("spec", "restartPolicy"), ("status", "health")):
        del properties[part]["properties"][field]
    yield older
    apply_crds(control_plane)


def test_a_newer_operator_leaves_every_running_pod_as_it_is(site):
    site.played.paused = True
    site.apply(job("steady"))
    site.operator.wait_for(lambda: site.status("steady").get("nodesText") == "3/3", "all nodes run", 60)
    before = {p["metadata"]["uid"]: p["metadata"]["resourceVersion"] for p in site.get("pods")["items"]}
    assert len(before) == 4, "three workers and a coordinator"
    site.operator.kill()

    with site.make_operator("--image=example.invalid/trainer:2") as newer:
        newer.wait_until_ready()
        newer.wait_for(lambda: newer.metrics().get("sonoforge_reconcile_seconds_count", 0) >= 3, "passes", 30)
        assert {p["metadata"]["uid"]: p["metadata"]["resourceVersion"] for p in site.get("pods")["items"]} == before
        site.played.paused = False
        newer.wait_for(lambda: site.status("steady").get("phase") == "Succeeded", "it ends well", 60)
    assert (site.status("steady")["attempt"], site.status("steady")["restartsTotal"]) == (1, 0)


def test_a_job_written_under_an_older_crd_is_served_and_ends_under_the_next(site, control_plane, older_crd):
    control_plane.kubectl(
        "apply", "--server-side", "--force-conflicts", "--filename=-", stdin=yaml.safe_dump(older_crd)
    )
    site.operator.wait_for(lambda: "restartPolicy" not in explained(site), "the older CRD is served", 30)
    site.played.paused = True
    site.apply(job("old"))
    site.operator.wait_for(lambda: site.status("old").get("attempt") == 1, "it is accepted", 30)
    assert "restartPolicy" not in site.get("pj", "old")["spec"]
    assert "health" not in site.status("old")

    apply_crds(control_plane)
    site.operator.wait_for(lambda: "restartPolicy" in explained(site), "the newer CRD is served", 30)
    served = site.get("pj", "old")["spec"]
    assert served["restartPolicy"]["stallAfter"] == "auto", "what is new has its default"
    site.kubectl("patch", "pj", "old", "--type=merge", '--patch={"spec": {"ttlAfterFinished": "1h"}}')
    site.played.paused = False
    site.wait_for_phase("old", "Succeeded")
    assert "health" in site.status("old")
    assert site.get("pj", "old")["spec"]["ttlAfterFinished"] == "1h"


def explained(site: Site) -> str:
    return site.kubectl("explain", "pj.spec")
