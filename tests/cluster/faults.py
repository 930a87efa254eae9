"""Ways to break a cluster with real nodes while a job trains on it. Each returns how it is mended."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import psutil
from control_plane import API_SERVER, ETCD
from node import Node, add_gpus
from real_site import DATA, RealSite, job
from worker_logs import records

from sonoforge_trainer.contract import CheckpointRef

_WAIT_SECONDS = 300
_EVALUATED_AT = 0.9
_EVALUATIONS_TRIED = 3
_LOOK_SECONDS = 0.05
_numbers = count(1)
_PRIORITY = {
    "apiVersion": "scheduling.k8s.io/v1",
    "kind": "PriorityClass",
    "metadata": {"name": "urgent"},
    "value": 1000,
}


@dataclass
class Fault:
    """Something that was broken."""

    way_back: Callable[[], None] = lambda: None
    """Mends it."""
    node: str = ""
    """The node that nobody reaches now."""

    def mend(self) -> None:
        """Mend it, once."""
        way_back, self.way_back = self.way_back, lambda: None
        way_back()


Strike = Callable[[RealSite, str], Fault]
"""Breaks something of the job with that name."""


# --- pods and processes -----------------------------------------------------------------------------------------------


def kill_process(site: RealSite, name: str) -> Fault:
    """SIGKILL for a process that trains; its agent, which is the container, goes on."""
    pod = _alive(site.pods(name, "worker"))[0]
    (agent,) = site.cluster.node(pod["spec"]["nodeName"]).pids_of(pod["metadata"]["uid"])
    workers = [p for p in psutil.Process(agent).children(recursive=True) if _is_forked(p)]
    assert workers, "a process trains in every pod"
    workers[0].kill()
    return Fault()


def delete_worker(site: RealSite, name: str) -> Fault:
    """`kubectl delete pod` on a worker."""
    return _delete_pod(site, name, "worker")


def delete_coordinator(site: RealSite, name: str) -> Fault:
    """`kubectl delete pod` on the coordinator."""
    return _delete_pod(site, name, "coordinator")


def kill_operator(site: RealSite, name: str) -> Fault:
    """SIGKILL for the operator; the kubelet starts it again, and mending it gives it a pod that was never killed.

    In a pod that was killed often, it would be started again after minutes only.
    """
    del name

    def processes() -> list[int]:
        pods = _alive(site.operator_pods())
        return [pid for p in pods for pid in site.cluster.node(p["spec"]["nodeName"]).pids_of(p["metadata"]["uid"])]

    site.wait_for(processes, "an operator runs", _WAIT_SECONDS)
    for pid in processes():
        psutil.Process(pid).kill()

    def mend() -> None:
        for pod in _alive(site.operator_pods()):
            site.kubectl("delete", "pod", pod["metadata"]["name"], "--wait=false")

    return Fault(mend)


def with_operator(strike: Strike) -> Strike:
    """The same fault, and the operator killed in the same moment."""

    def both(site: RealSite, name: str) -> Fault:
        fault = strike(site, name)
        try:
            operator = kill_operator(site, name)
        except BaseException:
            fault.mend()
            raise

        def mend() -> None:
            fault.mend()
            operator.mend()

        return Fault(mend, fault.node)

    return both


def kill_evaluation(site: RealSite, name: str) -> Fault:
    """SIGKILL for an evaluation once it has worked for 90 % of the processor time that an earlier one took.

    Time by the clock would depend on what else runs. One that is over sooner is let go, and the next one has to serve.
    """
    seen: set[str] = set()
    took = float("inf")
    for _ in range(1 + _EVALUATIONS_TRIED):

        def fresh(known: frozenset[str] = frozenset(seen)) -> list[dict[str, dict[str, str]]]:
            return [pod for pod in _evaluations(site, name, "Running") if pod["metadata"]["uid"] not in known]

        site.wait_for(fresh, f"{name}: another evaluation runs", _WAIT_SECONDS)
        pod = fresh()[0]
        seen.add(pod["metadata"]["uid"])
        processes = site.cluster.node(pod["spec"]["nodeName"]).pids_of(pod["metadata"]["uid"])
        worked = _kill_after(processes[0], _EVALUATED_AT * took) if processes else None
        if worked is None:
            continue
        if worked >= _EVALUATED_AT * took:
            return Fault()
        took = min(took, worked)
    raise AssertionError("every evaluation was over before it could be killed")


def _kill_after(pid: int, seconds: float) -> float | None:
    """Kill a process once it has worked for so long. The processor time that it had; None where it ended unseen.

    One that ends by itself in the moment of the kill is none that was killed.
    """
    worked, deadline = None, time.monotonic() + _WAIT_SECONDS
    try:
        process = psutil.Process(pid)
        while process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
            times = process.cpu_times()
            worked = times.user + times.system
            if worked >= seconds:
                process.kill()
                break
            time.sleep(_LOOK_SECONDS)
    except psutil.NoSuchProcess:
        return worked if worked is not None and worked < seconds else None
    return worked


# --- nodes ------------------------------------------------------------------------------------------------------------


def drain(site: RealSite, name: str) -> Fault:
    """`kubectl drain` of a node, while another one has room for what has to leave."""
    node = plain_node(site, name)
    other = next(each for each in site.cluster.nodes if each != node)
    plane = site.cluster.control_plane

    def mend() -> None:
        plane.kubectl("uncordon", node.name)
        add_gpus(plane, other.name, 1)

    fault = Fault(mend)
    add_gpus(plane, other.name, 2)
    try:
        plane.kubectl("drain", node.name, "--delete-emptydir-data", "--force", "--timeout=120s")
    except BaseException:
        fault.mend()
        raise
    return fault


def pull_cable(site: RealSite, name: str) -> Fault:
    """The cable of a node with nothing of the job but a worker."""
    return _pulled(site, plain_node(site, name))


def cut_power(site: RealSite, name: str) -> Fault:
    """The power of such a node."""
    node = plain_node(site, name)
    node.cut_power()

    def mend() -> None:
        node.switch_on()
        site.cluster.wait_until_ready([node.name])
        add_gpus(site.cluster.control_plane, node.name, 1)

    return Fault(mend, node.name)


def cut_coordinators_node(site: RealSite, name: str) -> Fault:
    """The cable of the node with the coordinator, which has a worker too."""
    (pod,) = _alive(site.pods(name, "coordinator"))
    return _pulled(site, site.cluster.node(pod["spec"]["nodeName"]))


def fill_disk(site: RealSite, name: str) -> Fault:
    """No byte is left on the disk of a node's pods."""
    node = plain_node(site, name)
    return Fault(node.fill_disk())


# --- jobs -------------------------------------------------------------------------------------------------------------


def preempt(site: RealSite, name: str) -> Fault:
    """A job of a higher priority takes a node, trains, and ends."""
    del name
    urgent = f"urgent-{next(_numbers)}"
    runtime = site.runtime()
    runtime["metadata"]["name"] = "urgent"
    runtime["spec"]["workers"]["priorityClassName"] = "urgent"
    manifest = job(urgent, steps=20, every=20, nodes=1)
    manifest["spec"]["runtimeRef"]["name"] = "urgent"
    site.apply(_PRIORITY, runtime, manifest)

    def mend() -> None:
        site.wait_for(lambda: site.phase(urgent) == "Succeeded", f"{urgent} is done", _WAIT_SECONDS)
        site.kubectl("delete", "pj", urgent, "--wait=false")

    return Fault(mend)


def shrink(site: RealSite, name: str) -> Fault:
    """`kubectl patch` to one node; three again to mend it."""

    def resize(nodes: int) -> None:
        site.kubectl("patch", "pj", name, "--type=merge", f'--patch={{"spec":{{"workers":{{"maxNodes":{nodes}}}}}}}')

    resize(1)
    return Fault(partial(resize, 3))


def suspend(site: RealSite, name: str) -> Fault:
    """`kubectl patch` to suspend; resumed to mend it, once every worker has saved and left."""

    def ask(wish: str) -> None:
        site.kubectl("patch", "pj", name, "--type=merge", f'--patch={{"spec":{{"suspend":{wish}}}}}')

    def resume() -> None:
        try:
            site.wait_for(lambda: site.phase(name) == "Suspended", f"{name} has released its nodes", _WAIT_SECONDS)
            ends = [record for record in records(site, name) if record.get("event") == "stopped"]
            assert any(record.get("asked") is True for record in ends), "its workers left as they were asked"
        finally:
            ask("false")

    ask("true")
    return Fault(resume)


# --- storage ----------------------------------------------------------------------------------------------------------


def stop_s3(site: RealSite, name: str) -> Fault:
    """The S3 server is gone, with all its connections."""
    del name
    site.s3.kill()
    return Fault(partial(_start_s3, site))


def spoil_shards(site: RealSite, name: str) -> Fault:
    """A flipped bit in every shard, and a new pod that has to read them; repaired as soon as the job names its data."""
    shards = [uri for uri in site.objects(f"{DATA}/train/") if uri.endswith(".tar")]
    assert shards, "the data set has shards"
    good = {uri: site.flip_bit(uri) for uri in shards}
    try:
        delete_worker(site, name)
        site.wait_for(lambda: site.status(name)["restarts"].get("data"), f"{name} names its data", _WAIT_SECONDS)
    finally:
        for uri, content in good.items():
            site.put(uri, content)
    return Fault()


def spoil_checkpoints(number: int) -> Strike:
    """A flipped bit in the training state of the newest checkpoints, and a process that cannot save a new one."""

    def strike(site: RealSite, name: str) -> Fault:
        progress = site.progress(name)
        assert progress, "the job trains"
        newest: tuple[CheckpointRef, ...] = progress.checkpoints[-number:]
        for checkpoint in newest:
            states = [o for o in site.objects(f"{checkpoint.uri}/") if "state" in o.rsplit("/", 1)[-1]]
            assert states, site.objects(f"{checkpoint.uri}/")
            site.flip_bit(states[0])
        return kill_process(site, name)

    return strike


# --- the control plane ------------------------------------------------------------------------------------------------


def stop_api_server(site: RealSite, name: str) -> Fault:
    """Nobody answers for the cluster."""
    del name
    plane = site.cluster.control_plane
    plane.components[API_SERVER].kill()

    def mend() -> None:
        if not plane.components[API_SERVER].running:
            plane.components[API_SERVER].start()
        plane.wait_until_ready()

    return Fault(mend)


def restart_etcd(site: RealSite, name: str) -> Fault:
    """SIGKILL for etcd, which is started again at once."""
    del name
    site.cluster.control_plane.restart(ETCD)
    return Fault()


# --- helpers ----------------------------------------------------------------------------------------------------------


def plain_node(site: RealSite, name: str) -> Node:
    """A node with a worker of the job and neither its coordinator nor the operator."""
    others = {pod["spec"].get("nodeName") for pod in (*site.pods(name, "coordinator"), *site.operator_pods())}
    names = sorted({pod["spec"]["nodeName"] for pod in _alive(site.pods(name, "worker"))} - others)
    assert names, "three nodes, and two pods to keep away from"
    return site.cluster.node(names[0])


def _alive(pods: list[Any]) -> list[Any]:
    """Those that run and were not told to end; after a lost node there are others."""
    return [p for p in pods if p["status"].get("phase") == "Running" and "deletionTimestamp" not in p["metadata"]]


def _pulled(site: RealSite, node: Node) -> Fault:
    node.pull_cable()

    def mend() -> None:
        node.plug_in()
        site.cluster.wait_until_ready([node.name])

    return Fault(mend, node.name)


def _delete_pod(site: RealSite, name: str, part: str) -> Fault:
    pod = _alive(site.pods(name, part))[0]["metadata"]["name"]
    site.kubectl("delete", "pod", pod, "--wait=false")
    return Fault()


def _start_s3(site: RealSite) -> None:
    if not site.s3.running:
        site.s3.start()


def _evaluations(site: RealSite, name: str, phase: str) -> list[dict[str, dict[str, str]]]:
    return [pod for pod in site.pods(name, "evaluation") if pod["status"]["phase"] == phase]


def _is_forked(process: psutil.Process) -> bool:
    """Whether a process was forked by the agent's fork server, as those that train are."""
    parent = process.parent()
    return parent is not None and any("forkserver" in word for word in parent.cmdline())
