"""The harness: a real control plane, played nodes, and components that can be broken."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from components import wait_for
from control_plane import API_SERVER, ETCD
from kubernetes import client


def status(kubectl, name: str) -> dict[str, Any]:
    return json.loads(kubectl("get", "job", name, "--output=json"))["status"]


def finished(kubectl, name: str) -> str | None:
    """Complete, Failed, or None while it is neither."""
    ends = {"Complete", "Failed"} & {each["type"] for each in status(kubectl, name).get("conditions", [])}
    return ends.pop() if ends else None


def test_the_api_server_is_the_pinned_release_and_answers(control_plane):
    version = json.loads(control_plane.kubectl("version", "--output=json"))
    assert version["serverVersion"]["gitVersion"] == "v1.34.4"
    assert version["clientVersion"]["gitVersion"] == "v1.34.4"
    assert control_plane.kubectl("get", "--raw=/readyz") == "ok"


def test_a_job_is_scheduled_on_a_played_node_and_completes_when_its_pod_is_told_to(kubectl, nodes, pods, job_of):
    kubectl("create", "--filename=-", stdin=yaml.safe_dump(job_of("told")))
    wait_for(lambda: len(pods.names("job-name=told")) == 1, "one pod")
    (name,) = pods.names("job-name=told")
    pods.wait_for_phase(name, "Running")
    assert json.loads(kubectl("get", "pod", name, "--output=json"))["spec"]["nodeName"] in nodes
    assert finished(kubectl, "told") is None
    pods.succeed(name)
    wait_for(lambda: finished(kubectl, "told") == "Complete", "the job is complete")


def test_a_pod_ends_by_itself_with_the_code_and_message_of_its_annotations(kubectl, nodes, pods, job_of):
    played = {"finish-after": "100ms", "exit-code": "3", "message": '{"cause": "storage"}'}
    annotations = {f"cluster.sonoforge.dev/{key}": value for key, value in played.items()}
    kubectl("create", "--filename=-", stdin=yaml.safe_dump(job_of("ends", annotations=annotations)))
    wait_for(lambda: finished(kubectl, "ends") == "Failed", "the job failed")
    (pod,) = json.loads(kubectl("get", "pods", "--selector=job-name=ends", "--output=json"))["items"]
    state = pod["status"]["containerStatuses"][0]["state"]
    ended = state.pop("terminated")
    assert state == {}  # a container is in one state
    assert (ended["exitCode"], ended["message"]) == (3, '{"cause": "storage"}')


def test_a_disrupted_pod_is_not_held_against_its_job_and_a_failed_one_is(kubectl, nodes, pods, job_of):
    """The rest of the player: pods wait, run, are told to make room, fail."""
    rule = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    policy = {"podReplacementPolicy": "Failed", "podFailurePolicy": {"rules": [rule]}}
    held = {"cluster.sonoforge.dev/hold": "yes"}
    job = job_of("moves", annotations=held, completions=2, parallelism=2, **policy)
    kubectl("create", "--filename=-", stdin=yaml.safe_dump(job))
    wait_for(lambda: len(pods.names("job-name=moves")) == 2, "two pods")
    first, second = pods.names("job-name=moves")
    pods.hold(first, "ImagePullBackOff")
    assert "ImagePullBackOff" in kubectl("get", "pod", first)
    for name in (first, second):
        pods.run(name)
        assert "Running" in kubectl("get", "pod", name)
    pods.disrupt(first)
    pods.fail(second, 3, "out of memory", reason="OOMKilled")
    wait_for(lambda: finished(kubectl, "moves") == "Failed", "the job failed")
    assert status(kubectl, "moves")["failed"] == 1  # of two that ended


def test_a_deleted_pod_ends_with_the_code_of_a_signal_before_it_goes(kubectl, nodes, pods, job_of):
    """As with a kubelet: the job counts the failure, because the status came before the object went."""
    annotations = {"cluster.sonoforge.dev/stop-after": "1s"}
    job = job_of("stops", annotations=annotations, podReplacementPolicy="Failed")
    kubectl("create", "--filename=-", stdin=yaml.safe_dump(job))
    wait_for(lambda: len(pods.names("job-name=stops")) == 1, "one pod")
    (name,) = pods.names("job-name=stops")
    pods.wait_for_phase(name, "Running")
    kubectl("delete", "pod", name, "--wait=false")
    assert "Terminating" in kubectl("get", "pod", name)
    wait_for(lambda: finished(kubectl, "stops") == "Failed", "the job failed")
    assert status(kubectl, "stops")["failed"] == 1
    wait_for(lambda: name not in kubectl("get", "pods", "--output=name"), "the pod is gone")


def test_the_namespace_refuses_a_pod_that_is_not_restricted(kubectl, namespace):
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "loose"},
        "spec": {"containers": [{"name": "main", "image": "example.invalid/main:1"}]},
    }
    with pytest.raises(subprocess.CalledProcessError) as refused:
        kubectl("create", "--filename=-", stdin=yaml.safe_dump(pod))
    assert 'violates PodSecurity "restricted:latest"' in refused.value.stderr


def test_a_user_may_do_what_rbac_says_and_its_writes_are_counted(control_plane, kubectl, namespace):
    kubectl("create", "role", "maps", "--verb=create,get", "--resource=configmaps")
    kubectl("create", "rolebinding", "maps", "--role=maps", "--user=somebody")
    kubectl("create", "serviceaccount", "robot")
    somebody = control_plane.kubeconfig_of("somebody")
    kubectl("create", "configmap", "mine", kubeconfig=somebody)
    assert kubectl("auth", "can-i", "delete", "configmaps", kubeconfig=somebody, check=False) == "no\n"
    robot = control_plane.kubeconfig_of_service_account(namespace, "robot")
    who = json.loads(kubectl("auth", "whoami", "--output=json", kubeconfig=robot))
    assert who["status"]["userInfo"]["username"] == f"system:serviceaccount:{namespace}:robot"
    writes = control_plane.writes("somebody")
    assert writes["create", "configmaps"] == 1
    assert writes["delete", "configmaps"] == 0


@pytest.mark.parametrize("name", [API_SERVER, ETCD])
def test_what_was_written_is_still_there_after_a_kill(control_plane, api_client, namespace, name):
    core = client.CoreV1Api(api_client)
    core.create_namespaced_config_map(namespace, {"metadata": {"name": f"before-{name}"}, "data": {"a": "1"}})
    before = control_plane.components[name].pid
    control_plane.restart(name)
    assert control_plane.components[name].pid != before
    assert core.read_namespaced_config_map(f"before-{name}", namespace).data == {"a": "1"}


def test_nothing_is_left_running_when_the_one_who_started_it_is_killed(programs, tmp_path):
    """Also SIGKILL, which nobody can answer: the programs end because their input does."""
    here = Path(__file__).parent
    script = f"""
import sys, time
sys.path.insert(0, {str(here)!r})
from pathlib import Path
from control_plane import ControlPlane, ETCD
plane = ControlPlane(Path({str(programs[0])!r}), Path({str(tmp_path)!r}))
plane._prepare()
plane.components[ETCD].start()
print(plane.components[ETCD].pid, flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    with parent:
        assert parent.stdout
        etcd = psutil.Process(int(parent.stdout.readline()))
        os.kill(parent.pid, signal.SIGKILL)
    wait_for(lambda: not etcd.is_running() or etcd.status() == psutil.STATUS_ZOMBIE, "etcd is gone")
