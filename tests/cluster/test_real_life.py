"""The whole life of a job with real containers: from manifests to Succeeded, on three nodes."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.audit import log_faults, read_logs
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
    status = real_site.status("life")
    assert status["phase"] == "Succeeded", real_site.describe()
    assert nodes == {"node-1", "node-2", "node-3"}
    checkpoints = real_site.get("ckpt", "--selector=sonoforge.dev/job=life")["items"]
    assert sorted(c["spec"]["step"] for c in checkpoints) == [0, 8, 16, 24]
    for checkpoint in checkpoints:
        (evaluation,) = checkpoint["status"]["evaluations"]
        assert evaluation["phase"] == "Succeeded"
    real_site.download("s3://sonoforge/runs/life", tmp_path)
    logs = read_logs(sorted(path.parent for path in tmp_path.glob("step-*/COMMIT*")))
    assert log_faults(logs, steps=STEPS, virtual_ranks=4) == []
