"""The policies of a job and of the operator on a real network: what the evaluator says is what packets do.

Every pod is a network namespace with real sockets, and iptables refuses in it what the enforcer makes of the policies.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helm import Helm
from policy_enforcer import rules
from policy_evaluator import Pod, Policies
from test_network_policies import CHART, NARROW, TRIED, World, world

SCRIPT = Path(__file__).with_name("reaching.py")
PORTS = [f"{port.protocol.lower()}/{port.number}" for port in TRIED]


def needed() -> str:
    """What this machine lacks; empty where it lacks nothing."""
    missing = [program for program in ("ip", "iptables-restore", "nsenter") if not shutil.which(program)]
    if os.geteuid() != 0:
        return "network namespaces need root"
    return f"not installed: {', '.join(missing)}" if missing else ""


pytestmark = pytest.mark.skipif(bool(needed()), reason=needed())


class Network:
    """Network namespaces on one switch, one for each end; every address is next door."""

    def __init__(self, ends: tuple[Pod, ...]) -> None:
        self.ends = ends
        self._stem = f"sf{secrets.token_hex(2)}"
        self._names = {end.name: f"{self._stem}-{number}" for number, end in enumerate(ends)}
        self._listeners: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Network:
        self._ip("netns", "add", self._stem)
        try:
            self._in_switch("link", "add", "switch", "type", "bridge")
            self._in_switch("link", "set", "switch", "up")
            for end in self.ends:
                self._plug(end, self._names[end.name])
            for name in self._names.values():
                self._listen(name)
            for listener in self._listeners:
                assert listener.stdout is not None
                assert listener.stdout.readline() == "listening\n"
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for listener in self._listeners:
            listener.kill()
            listener.communicate()
        for name in (self._stem, *self._names.values()):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def enforce(self, policies: Policies) -> None:
        """Refuse in every pod what the policies do not let pass."""
        for end in self.ends:
            if end.in_cluster:
                self._run(self._names[end.name], "iptables-restore", stdin=rules(policies, end, self.ends))

    def reached(self, source: Pod) -> dict[str, list[str]]:
        """The ports that answer to a pod, by the name of who answers."""
        others = {end.address: end.name for end in self.ends if end != source}
        said = self._run(self._names[source.name], sys.executable, str(SCRIPT), "reach", ",".join(others), *PORTS)
        return {others[address]: ports for address, ports in json.loads(said).items()}

    def _plug(self, end: Pod, name: str) -> None:
        """Make the namespace of an end and connect it with the switch."""
        self._ip("netns", "add", name)
        port = f"p{name.rpartition('-')[2]}"
        self._in_switch("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
        self._in_switch("link", "set", port, "master", "switch", "up")
        for arguments in (
            ("link", "set", "lo", "up"),
            ("address", "add", f"{end.address}/32", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("route", "add", "default", "dev", "eth0"),
        ):
            self._ip("-netns", name, *arguments)
        # Refusals are many here, and each has to arrive.
        self._run(name, "sh", "-c", "echo 0 > /proc/sys/net/ipv4/icmp_ratemask")

    def _listen(self, name: str) -> None:
        command = ["nsenter", f"--net=/var/run/netns/{name}", sys.executable, str(SCRIPT), "listen", *PORTS]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._listeners.append(subprocess.Popen(command, text=True, **pipes))

    def _in_switch(self, *arguments: str) -> None:
        self._ip("-netns", self._stem, *arguments)

    @staticmethod
    def _ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    @staticmethod
    def _run(name: str, *command: str, stdin: str = "") -> str:
        entered = ["nsenter", f"--net=/var/run/netns/{name}", *command]
        return subprocess.run(entered, check=True, capture_output=True, text=True, input=stdin).stdout


@pytest.fixture(scope="module")
def narrow(newest_helm: Helm) -> World:
    """The world of the other tests, without what speaks another protocol than IPv4."""
    rendered = newest_helm.render(CHART | {"watchNamespaces": ["research"]}, namespace="sonoforge-system")
    made = world(NARROW, rendered, blocks_hold_for_pods=True, operator_at="sonoforge-system")
    return World(tuple(pod for pod in made.pods if ":" not in pod.address), made.policies)


@pytest.fixture(scope="module")
def network(narrow: World) -> Iterator[Network]:
    with Network(narrow.pods) as made:
        yield made


def test_packets_go_where_the_evaluator_says_and_nowhere_else(narrow: World, network: Network):
    worker = narrow.pods[0]
    everything = {end.name: PORTS for end in network.ends if end != worker}
    assert network.reached(worker) == everything, "without rules all ports of all ends answer"
    network.enforce(narrow.policies)
    for source in narrow.pods:
        said = {
            target.name: [PORTS[n] for n, port in enumerate(TRIED) if narrow.policies.allow(source, target, port)]
            for target in narrow.pods
            if target != source
        }
        assert network.reached(source) == said, source.name
