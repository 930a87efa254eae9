"""The node harness itself: what a cable, a power switch and a lost node are to Kubernetes."""

from __future__ import annotations

import subprocess
import time
from typing import Any

import pytest
from components import wait_for
from images import build_images, tag_of
from node import Node
from real_site import RealSite

pytestmark = pytest.mark.timeout(1800)


def not_ready(site: RealSite, node: Node) -> None:
    wait_for(lambda: node.name not in site.cluster.ready(), f"{node.name} is not ready", 60)


def ready_operators(site: RealSite) -> list[Any]:
    """Pods of the operator that are ready, on a node that is."""
    return [
        pod
        for pod in site.operator_pods()
        if "deletionTimestamp" not in pod["metadata"]
        and any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", []))
        and pod["spec"]["nodeName"] in site.cluster.ready()
    ]


def test_a_node_whose_cable_is_pulled_is_lost_goes_on_running_and_comes_back(real_site: RealSite) -> None:
    node = real_site.cluster.nodes[-1]
    began = time.monotonic()
    node.pull_cable()
    try:
        not_ready(real_site, node)
        assert node.containerd.images(), "it runs on"
        assert time.monotonic() - began > 10, "nobody was told: only the missing heartbeat says so"
    finally:
        node.plug_in()
    real_site.cluster.wait_until_ready([node.name])


def test_a_node_whose_power_is_cut_holds_no_process_and_can_be_switched_on_again(real_site: RealSite) -> None:
    node = real_site.cluster.nodes[-1]
    node.cut_power()
    try:
        inside = subprocess.run(
            ["ip", "netns", "pids", node.outlet.namespace.name], capture_output=True, text=True, check=True
        )
        assert inside.stdout == ""
        not_ready(real_site, node)
    finally:
        node.switch_on()
    real_site.cluster.wait_until_ready([node.name])


def test_the_operator_runs_in_its_image_without_torch_and_under_250_mb(real_site: RealSite) -> None:
    layout = build_images()
    assert layout.size(layout.manifest(tag_of("operator"))) < 250e6
    # Where the node of the tests before was the operator's, another pod takes over, or the same one starts again.
    real_site.wait_for(lambda: ready_operators(real_site), "the operator is ready", 120)
    pod = ready_operators(real_site)[0]
    assert pod["status"]["containerStatuses"][0]["image"].endswith(tag_of("operator"))
    name = pod["metadata"]["name"]
    asked = real_site.kubectl(
        "exec", name, "--", "python3", "-c", "import importlib.util as u; print(u.find_spec('torch'))"
    )
    assert asked.strip() == "None"
    assert real_site.kubectl("exec", name, "--", "id", "-u").strip() == "65532"
