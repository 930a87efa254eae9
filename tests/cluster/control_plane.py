"""A real Kubernetes control plane as four processes of this user: etcd, API server, controller manager, scheduler.

Everything that it needs and writes is in one folder: keys, kubeconfigs, data, logs and, where asked for, the audit log.
"""

from __future__ import annotations

import base64
import json
import re
import ssl
import subprocess
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml
from components import Component, free_ports, wait_for

ETCD, API_SERVER, CONTROLLERS, SCHEDULER = "etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler"
LOOPBACK = "127.0.0.1"
SERVICE_NETWORK = "10.96.0.0/16"
_ADMIN = ("admin", "system:masters")
_SERVICE_ADDRESS = "10.96.0.1"

# Writes only: reads are most of the requests, and nobody counts them.
_AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [
        {"level": "Metadata", "verbs": ["create", "update", "patch", "delete", "deletecollection"]},
        {"level": "None"},
    ],
}


class ControlPlane:
    """The control plane as a context manager; its components can be stopped and started one by one."""

    def __init__(
        self,
        programs: Path,
        directory: Path,
        *,
        audit: bool = False,
        address: str = LOOPBACK,
        arguments: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Make a control plane of the built programs that is not started yet.

        Args:
            programs: Folder of the built programs.
            directory: A folder of its own.
            audit: Keep a record of every write, for `writes`.
            address: Where the API server listens. Nodes in network namespaces cannot reach the loopback.
            arguments: More command line arguments, by component; the last of two that contradict each other counts.
        """
        self.programs = programs
        self.directory = directory.resolve()
        self.audit_log = self.directory / "audit.log" if audit else None
        self.address = address
        self._kubeconfigs: dict[tuple[str, ...], Path] = {}
        etcd, peer, api, controllers, scheduler = free_ports(5)
        self.url = f"https://{address}:{api}"
        more = arguments or {}
        own = {
            ETCD: self._etcd(etcd, peer),
            API_SERVER: self._api_server(etcd, api),
            CONTROLLERS: self._controllers(controllers),
            SCHEDULER: self._scheduler(scheduler),
        }
        self.components = {
            name: Component(programs / name, [*flags, *more.get(name, ())], self.directory / f"{name}.log")
            for name, flags in own.items()
        }
        self._health = {
            ETCD: f"http://{LOOPBACK}:{etcd}/health",
            API_SERVER: f"{self.url}/readyz",
            CONTROLLERS: f"https://{LOOPBACK}:{controllers}/healthz",
            SCHEDULER: f"https://{LOOPBACK}:{scheduler}/healthz",
        }

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start all and wait until a pod could be created and scheduled. Raises TimeoutError or RuntimeError."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._prepare()
        try:
            self.components[ETCD].start()
            self.components[API_SERVER].start()
            self.wait_until_ready(API_SERVER)
            self.components[CONTROLLERS].start()
            self.components[SCHEDULER].start()
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all, last started first. Nothing is lost that anyone would read again, so none is asked first."""
        for component in reversed(self.components.values()):
            component.kill()

    def restart(self, name: str) -> None:
        """Kill a component, start it again and wait until all are ready."""
        self.components[name].kill()
        self.components[name].start()
        self.wait_until_ready()

    def wait_until_ready(self, *names: str, seconds: float = 60.0) -> None:
        """Wait until the named components, or all of them and the default service account, are ready.

        Raises TimeoutError, and RuntimeError where one of them has ended.
        """

        def ready() -> bool:
            for name in names or self._health:
                component = self.components[name]
                if not component.running:
                    raise RuntimeError(f"{name} ended: {component.log_end()}")
                if not self._healthy(self._health[name]):
                    return False
            # Pods need it, and the controller manager makes it: one that is there says that controllers run.
            return bool(names) or self._healthy(f"{self.url}/api/v1/namespaces/default/serviceaccounts/default")

        wait_for(ready, f"{' and '.join(names) or 'the control plane'} ready", seconds)

    @property
    def kubeconfig(self) -> Path:
        """The administrator's."""
        return self.kubeconfig_of(*_ADMIN)

    def kubeconfig_of(self, user: str, *groups: str) -> Path:
        """A kubeconfig with a client certificate for any user: what the user may do is for RBAC to say."""
        if (user, *groups) not in self._kubeconfigs:
            self._certificates(self._user(user, *groups))
            self._write_user(user, *groups)
        return self._kubeconfigs[user, *groups]

    def kubeconfig_of_service_account(self, namespace: str, name: str) -> Path:
        """A kubeconfig with a token of a service account that exists, valid for an hour."""
        token = self.kubectl("create", "token", name, "--namespace", namespace).strip()
        return self.write_kubeconfig(f"{namespace}-{name}", {"token": token})

    def write_kubeconfig(self, name: str, credentials: Mapping[str, str]) -> Path:
        """Write DIRECTORY/NAME.kubeconfig, complete in itself and readable by this user only."""
        cluster = {"server": self.url, "certificate-authority-data": _encoded(self.directory / "ca.crt")}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": name, "user": dict(credentials)}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": name}}],
        }
        path = self.directory / f"{name}.kubeconfig"
        path.touch(mode=0o600)
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    def kubectl(
        self, *arguments: str, stdin: str | None = None, kubeconfig: Path | None = None, check: bool = True
    ) -> str:
        """Run kubectl, and return what it printed. Raises CalledProcessError with its standard error as a note."""
        done = subprocess.run(
            [str(self.programs / "kubectl"), f"--kubeconfig={kubeconfig or self.kubeconfig}", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": str(self.programs), "HOME": str(self.directory)},  # its cache of discovery goes there
        )
        if check and done.returncode:
            error = subprocess.CalledProcessError(done.returncode, ["kubectl", *arguments], done.stdout, done.stderr)
            error.add_note(done.stderr)
            raise error
        return done.stdout

    def get(self, *arguments: str) -> Any:
        """What `kubectl get ARGUMENTS -o json` prints, read."""
        return json.loads(self.kubectl("get", *arguments, "--output=json"))

    def audit_events(self) -> Iterator[dict[str, Any]]:
        """Every write so far, as audit.k8s.io/v1 events."""
        assert self.audit_log, "the control plane was started without audit=True"
        with self.audit_log.open() as file:
            yield from (json.loads(line) for line in file)

    def writes(self, user: str) -> Counter[tuple[str, str]]:
        """How often the user wrote, by verb and resource: ("patch", "jobs/status")."""
        counts: Counter[tuple[str, str]] = Counter()
        for event in self.audit_events():
            if event["user"]["username"] == user and "objectRef" in event:
                reference = event["objectRef"]
                resource = "/".join(filter(None, (reference["resource"], reference.get("subresource"))))
                counts[event["verb"], resource] += 1
        return counts

    def _healthy(self, url: str) -> bool:
        try:
            with self._opener.open(url, timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:  # refused, reset, timed out, or an answer that says no
            return False

    def _prepare(self) -> None:
        names = {"localhost", LOOPBACK, self.address, _SERVICE_ADDRESS, "kubernetes", "kubernetes.default.svc"}
        users = (_ADMIN, (f"system:{CONTROLLERS}",), (f"system:{SCHEDULER}",))
        self._certificates(
            {"file": "server", "user": "kube-apiserver", "hosts": sorted(names)},
            {"file": "kubelet-client", "user": "kube-apiserver-kubelet-client", "groups": ["system:masters"]},
            {"file": "service-account", "user": "service-accounts"},
            *(self._user(*each) for each in users),
        )
        for each in users:
            self._write_user(*each)
        if self.audit_log:
            (self.directory / "audit-policy.yaml").write_text(yaml.safe_dump(_AUDIT_POLICY))
        context = ssl.create_default_context(cafile=self.directory / "ca.crt")
        admin = self._file(*_ADMIN)
        context.load_cert_chain(admin.with_suffix(".crt"), admin.with_suffix(".key"))
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )

    def _file(self, *user: str) -> Path:
        """Path of a user's files, without their ending."""
        return self.directory / re.sub(r"[^a-z0-9]+", "-", "-".join(user).lower())

    def _user(self, user: str, *groups: str) -> dict[str, Any]:
        return {"file": str(self._file(user, *groups)), "user": user, "groups": groups}

    def _write_user(self, *user: str) -> None:
        file = self._file(*user)
        credentials = {
            "client-certificate-data": _encoded(file.with_suffix(".crt")),
            "client-key-data": _encoded(file.with_suffix(".key")),
        }
        self._kubeconfigs[user] = self.write_kubeconfig(file.name, credentials)

    def _certificates(self, *wanted: Mapping[str, Any]) -> None:
        order = {"authority": "ca", "certificates": wanted}
        subprocess.run(
            [str(self.programs / "certificates")], input=json.dumps(order).encode(), cwd=self.directory, check=True
        )

    # Arguments name files relative to the folder, in which the programs run.

    def _etcd(self, client: int, peer: int) -> list[str]:
        return [
            "--name=test",
            "--data-dir=etcd",
            f"--listen-client-urls=http://{LOOPBACK}:{client}",
            f"--advertise-client-urls=http://{LOOPBACK}:{client}",
            f"--listen-peer-urls=http://{LOOPBACK}:{peer}",
            f"--initial-advertise-peer-urls=http://{LOOPBACK}:{peer}",
            f"--initial-cluster=test=http://{LOOPBACK}:{peer}",
            "--unsafe-no-fsync",  # a killed process loses nothing by it, and nobody cuts the power of a test
            "--log-level=warn",
        ]

    def _api_server(self, etcd: int, port: int) -> list[str]:
        audit = [
            "--audit-policy-file=audit-policy.yaml",
            f"--audit-log-path={self.audit_log}",
            "--audit-log-maxsize=4096",
        ]
        return [
            f"--etcd-servers=http://{LOOPBACK}:{etcd}",
            f"--bind-address={self.address}",
            f"--advertise-address={self.address}",
            f"--secure-port={port}",
            # The loopback cannot be an endpoint of the service `kubernetes`.
            *(["--endpoint-reconciler-type=none"] if self.address == LOOPBACK else []),
            "--tls-cert-file=server.crt",
            "--tls-private-key-file=server.key",
            "--client-ca-file=ca.crt",
            "--kubelet-client-certificate=kubelet-client.crt",
            "--kubelet-client-key=kubelet-client.key",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--service-account-key-file=service-account.crt",
            "--service-account-signing-key-file=service-account.key",
            f"--service-cluster-ip-range={SERVICE_NETWORK}",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--allow-privileged",
            *(audit if self.audit_log else []),
        ]

    def _controllers(self, port: int) -> list[str]:
        return [
            *self._client(CONTROLLERS, port),
            # Each controller has rights of its own; the manager itself has hardly any.
            "--use-service-account-credentials",
            "--root-ca-file=ca.crt",
            "--service-account-private-key-file=service-account.key",
            "--use-service-account-credentials",  # the rights of each controller, and no others
            "--concurrent-job-syncs=20",
            # A node that is silent for 20 s is lost. With the usual 50 s a test of it takes a minute.
            "--node-monitor-period=1s",
            "--node-monitor-grace-period=20s",
        ]

    def _scheduler(self, port: int) -> list[str]:
        return self._client(SCHEDULER, port)

    def _client(self, name: str, port: int) -> list[str]:
        return [
            f"--kubeconfig=system-{name}.kubeconfig",
            f"--bind-address={LOOPBACK}",
            f"--secure-port={port}",
            "--tls-cert-file=server.crt",
            "--tls-private-key-file=server.key",
            "--leader-elect=false",
            # The limits of a client must not be what a test at scale measures.
            "--kube-api-qps=1000",
            "--kube-api-burst=2000",
        ]


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
