"""The whole life of a job with real containers: from manifests to Succeeded, on three nodes."""

from __future__ import annotations

from pathlib import Path

import pytest
from outcomes import differences, outcome_of
from real_site import RealSite, job

pytestmark = pytest.mark.timeout(1800)
STEPS, EVERY = 24, 8


def test_three_pods_on_three_nodes_train_and_every_checkpoint_is_evaluated(real_site: RealSite, tmp_path: Path) -> None:
    nodes: set[str] = set()

    def done() -> bool:
        running = [p for p in real_site.pods("life", "worker") if p["status"]["phase"] == "Running"]
        nodes.update(pod["spec"]["nodeName"] for pod in running)
        return real_site.phase("life") in ("Succeeded", "Failed")

    real_site.apply(job("life", steps=STEPS, every=EVERY))
    real_site.wait_for(done, "the job is done", 900)
    found = outcome_of(real_site, "life", tmp_path)
    assert found.phase == "Succeeded", real_site.describe()
    assert nodes == {"node-1", "node-2", "node-3"}
    checkpoints = real_site.get("ckpt", "--selector=sonoforge.dev/job=life")["items"]
    assert sorted(c["spec"]["step"] for c in checkpoints) == [0, 8, 16, 24]
    assert differences(found, found, steps=STEPS) == []
