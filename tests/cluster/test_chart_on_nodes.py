"""The chart on real nodes: its operator comes, changes and goes while three pods train."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helm import CHART, Helm
from outcomes import differences, outcome_of
from real_site import NAMESPACE, RealSite, job
from recovery import Watch
from scenarios import SECONDS, is_over

pytestmark = pytest.mark.timeout(1800)
JOB, STEPS, EVERY = "charted", 600, 200


@pytest.fixture
def release(bare_site: RealSite, newest_helm: Helm) -> Iterator[Callable[..., str]]:
    """Run helm with the release of the site's namespace: `release("install", str(CHART))`. Nothing of it is left."""
    helm = newest_helm.at(bare_site.cluster.control_plane.kubeconfig)
    where = (f"--namespace={NAMESPACE}", "--wait", "--timeout=3m")
    yield lambda what, *arguments: helm.run(what, "sonoforge", *arguments, *where)
    bare_site.kubectl("delete", "pj", JOB, "--ignore-not-found", "--wait=false")
    helm.run("uninstall", "sonoforge", "--ignore-not-found", *where)


def test_three_pods_train_on_while_their_operator_is_upgraded_rolled_back_uninstalled_and_installed_again(
    bare_site: RealSite, release: Callable[..., str], tmp_path: Path
) -> None:
    site = bare_site
    release("install", str(CHART), "--take-ownership")  # the CRDs are there
    site.apply(job(JOB, steps=STEPS, every=EVERY))
    watch = Watch(site, JOB)
    watch.wait_until(lambda p: p.nodes == 3 and p.step > 0, "three workers step", SECONDS)
    before = lives(site)
    assert len(before) == 4, "three workers and a coordinator"
    assert {p["spec"]["nodeName"] for p in site.pods(JOB, "worker")} == {node.name for node in site.cluster.nodes}

    def undisturbed(after: str, operators: int) -> None:
        site.wait_for(lambda: len(site.operator_pods()) == operators, f"{operators} operators", SECONDS)
        now = watch.wait_until(lambda p: p.step > 0, "it answers", SECONDS)
        watch.wait_until(lambda p: p.step > now.step, f"a step after {after}", SECONDS)
        assert lives(site) == before, after

    release("upgrade", str(CHART), "--set=replicas=2", "--set=podAnnotations.changed=yes")
    undisturbed("upgrade", 2)
    release("rollback", "1")
    undisturbed("rollback", 1)
    release("uninstall")
    undisturbed("uninstall", 0)
    release("install", str(CHART))
    undisturbed("a new install", 1)

    site.wait_for(lambda: is_over(site, JOB), f"{JOB} is done", SECONDS)
    found = outcome_of(site, JOB, tmp_path)
    assert differences(found, found, steps=STEPS) == []
    assert len(found.results) == 1 + STEPS // EVERY
    status = site.status(JOB)
    assert (status["attempt"], status["restartsTotal"]) == (1, 0)


def lives(site: RealSite) -> dict[str, int]:
    """Pods of the job that train, by uid, and how often each was started again."""
    pods = [*site.pods(JOB, "worker"), *site.pods(JOB, "coordinator")]
    return {p["metadata"]["uid"]: p["status"]["containerStatuses"][0]["restartCount"] for p in pods}
