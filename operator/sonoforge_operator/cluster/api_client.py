"""The Kubernetes API as the operator uses it: apply, list, patch a status, delete. On `kubernetes.aio`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import aiohttp
from kubernetes.aio import config as kube_config
from kubernetes.aio.client import ApiClient, Configuration

from sonoforge_operator.api import API_VERSION
from sonoforge_operator.cluster.names import MANAGER

Manifest = dict[str, Any]

_PAGE = 500
_TRIES, _LONGEST_WAIT_SECONDS = 4, 5.0
"""Tries of a request where the server asks to come again, and the longest wait that it may ask for."""
_METADATA = "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io"


@dataclass(frozen=True)
class Kind:
    """A kind of object and where the API keeps it."""

    name: str
    api_version: str
    plural: str

    def path(self, namespace: str | None, name: str = "", subresource: str = "") -> str:
        """Path of the objects of a namespace (None: of all), of one object, or of a part of it."""
        root = f"/apis/{self.api_version}" if "/" in self.api_version else f"/api/{self.api_version}"
        parts = [root, *(("namespaces", namespace) if namespace else ()), self.plural, name, subresource]
        return "/".join(part for part in parts if part)


JOBS = Kind("PretrainJob", API_VERSION, "pretrainjobs")
RUNTIMES = Kind("PretrainRuntime", API_VERSION, "pretrainruntimes")
SUITES = Kind("EvalSuite", API_VERSION, "evalsuites")
CHECKPOINTS = Kind("Checkpoint", API_VERSION, "checkpoints")
BATCH_JOBS = Kind("Job", "batch/v1", "jobs")
PODS = Kind("Pod", "v1", "pods")
DEPLOYMENTS = Kind("Deployment", "apps/v1", "deployments")
CONFIG_MAPS = Kind("ConfigMap", "v1", "configmaps")
SERVICE_ACCOUNTS = Kind("ServiceAccount", "v1", "serviceaccounts")
SERVICES = Kind("Service", "v1", "services")
POLICIES = Kind("NetworkPolicy", "networking.k8s.io/v1", "networkpolicies")
EVENTS = Kind("Event", "v1", "events")
LEASES = Kind("Lease", "coordination.k8s.io/v1", "leases")

OWN = (JOBS, RUNTIMES, SUITES, CHECKPOINTS)
"""Kinds of ours."""
CHILDREN = (BATCH_JOBS, PODS, DEPLOYMENTS)
"""Kinds that move by themselves, and are watched."""
STANDING = (CONFIG_MAPS, SERVICE_ACCOUNTS, SERVICES, POLICIES)
"""Kinds that stay as they were applied, and are listed now and then."""
KINDS = {kind.name: kind for kind in (*OWN, *CHILDREN, *STANDING, EVENTS, LEASES)}
"""Every kind by name."""


class ApiError(Exception):
    """The API server refused or did not answer."""

    longest_wait = 15.0
    """Seconds after which a pass that failed for it is made again at the latest: most of it may have been done."""

    def __init__(self, status: int, reason: str, message: str, retry_after: float = 0.0) -> None:
        super().__init__(f"{status} {reason}: {message}" if status else message)
        self.status = status
        """HTTP status; 0 where there was no answer."""
        self.reason = reason
        """Reason in one word."""
        self.message = message
        """Reason in a sentence."""
        self.retry_after = retry_after
        """Seconds that the server asks to wait."""


class ConflictError(ApiError):
    """Somebody else changed the object since it was read, or made one of its name."""

    longest_wait = 3.0
    """Shorter, because what was changed is read by then."""


class NotFoundError(ApiError):
    """The object, or its namespace, is not there."""


class Api:
    """A connection to the API server. Every method raises ApiError."""

    def __init__(self, configuration: Configuration, *, manager: str = MANAGER, timeout_seconds: float = 30.0) -> None:
        self._client = ApiClient(configuration)
        self._manager = manager
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        self.writes = 0
        """Requests that change something, since the start."""
        self.may_write: Callable[[], bool] = lambda: True
        """Asked before each of them; where it says no, nothing is sent."""

    @classmethod
    async def connect(cls, kubeconfig: str | None = None, context: str | None = None, manager: str = MANAGER) -> Self:
        """Connect with a kubeconfig file, or with the service account of the pod where none is given.

        `manager` is who is noted as the owner of the fields that are written.
        """
        configuration = Configuration()
        if kubeconfig:
            await kube_config.load_kube_config(  # type: ignore[no-untyped-call]
                config_file=kubeconfig, context=context, client_configuration=configuration
            )
        else:
            kube_config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        configuration.connection_pool_maxsize = 32
        configuration.retries = None
        return cls(configuration, manager=manager)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()  # type: ignore[no-untyped-call]

    # --- reading ------------------------------------------------------------------------------------------------------

    async def get(self, kind: Kind, namespace: str, name: str) -> Manifest:
        """One object."""
        return await self._request("GET", kind.path(namespace, name))

    async def list(
        self, kind: Kind, namespace: str | None, *, selector: str = "", fields: str = "", metadata_only: bool = False
    ) -> AsyncIterator[Manifest]:
        """Objects of a namespace (None: of all), in pages, by their labels and fields.

        With `metadata_only`, nothing but their metadata.
        """
        wanted = {"labelSelector": selector, "fieldSelector": fields}
        query = {"limit": str(_PAGE), **{name: value for name, value in wanted.items() if value}}
        while True:
            accept = _METADATA if metadata_only else "application/json"
            page = await self._request("GET", kind.path(namespace), query=query, accept=accept)
            for item in page.get("items") or ():
                yield item
            following = (page.get("metadata") or {}).get("continue")
            if not following:
                return
            query = {**query, "continue": following}

    async def logs(self, namespace: str, pod: str, *, tail: int) -> str:
        """The last lines that the container of a pod wrote."""
        path = PODS.path(namespace, pod, "log")
        return (await self._exchange("GET", path, {"tailLines": str(tail)}, None, "application/json", "*/*")).decode(
            errors="replace"
        )

    # --- writing ------------------------------------------------------------------------------------------------------

    async def apply(self, manifest: Manifest) -> Manifest:
        """Make an object what `manifest` says, by server-side apply. Returns it as it is now."""
        kind, metadata = KINDS[manifest["kind"]], manifest["metadata"]
        return await self._request(
            "PATCH",
            kind.path(metadata["namespace"], metadata["name"]),
            query={"fieldManager": self._manager, "force": "true"},
            body=manifest,
            content="application/apply-patch+yaml",
        )

    async def create(self, manifest: Manifest) -> Manifest:
        """Make an object that is not there yet. Raises ConflictError where it is."""
        kind, namespace = KINDS[manifest["kind"]], manifest["metadata"]["namespace"]
        return await self._request("POST", kind.path(namespace), query={"fieldManager": self._manager}, body=manifest)

    async def merge(self, kind: Kind, namespace: str, name: str, changes: Manifest) -> Manifest:
        """Change some fields of an object."""
        path = kind.path(namespace, name)
        content = "application/merge-patch+json"
        return await self._request("PATCH", path, query={"fieldManager": self._manager}, body=changes, content=content)

    async def put_status(self, kind: Kind, seen: Mapping[str, Any], status: Manifest) -> Manifest:
        """Replace the status of an object, unless it changed since it was `seen`: then ConflictError."""
        metadata = seen["metadata"]
        operations = [
            # As an update with this version: a `test` that fails is answered with 422, as is what makes no sense.
            {"op": "replace", "path": "/metadata/resourceVersion", "value": metadata["resourceVersion"]},
            {"op": "add", "path": "/status", "value": status},
        ]
        path = kind.path(metadata["namespace"], metadata["name"], "status")
        content = "application/json-patch+json"
        return await self._request(
            "PATCH", path, query={"fieldManager": self._manager}, body=operations, content=content
        )

    async def delete(
        self,
        kind: Kind,
        namespace: str,
        name: str,
        *,
        uid: str = "",
        propagation: str = "Background",
        grace_seconds: int | None = None,
    ) -> None:
        """Delete an object, with `uid` only that very one. One that is not there is no error."""
        body: Manifest = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": propagation}
        if uid:
            body["preconditions"] = {"uid": uid}
        if grace_seconds is not None:
            body["gracePeriodSeconds"] = grace_seconds
        try:
            await self._request("DELETE", kind.path(namespace, name), body=body)
        except (NotFoundError, ConflictError):
            return  # it is gone, or another one has its name

    async def replace(self, manifest: Manifest) -> Manifest:
        """Replace an object, unless it changed since it was read: then ConflictError."""
        kind, metadata = KINDS[manifest["kind"]], manifest["metadata"]
        path = kind.path(metadata["namespace"], metadata["name"])
        return await self._request("PUT", path, query={"fieldManager": self._manager}, body=manifest)

    # --- the wire -----------------------------------------------------------------------------------------------------

    async def _request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: object = None,
        content: str = "application/json",
        accept: str = "application/json",
    ) -> Manifest:
        for _ in range(_TRIES - 1):
            try:
                return _object(await self._exchange(method, path, query or {}, body, content, accept))
            except ApiError as error:
                if not 0 < error.retry_after <= _LONGEST_WAIT_SECONDS:
                    raise
                # The server is busy and did nothing: a whole pass again would cost it more than this request does.
                await asyncio.sleep(error.retry_after)
        return _object(await self._exchange(method, path, query or {}, body, content, accept))

    async def _exchange(
        self, method: str, path: str, query: Mapping[str, str], body: object, content: str, accept: str
    ) -> bytes:
        if method != "GET":
            if not self.may_write():
                raise ApiError(0, "NotLeading", "this replica does not hold the Lease any more")
            self.writes += 1
        headers = {"Accept": accept, "Content-Type": content}
        parameters = await self._client.param_serialize(
            method,
            path,
            query_params=list(query.items()),
            header_params=headers,
            body=body,
            auth_settings=["BearerToken"],
        )
        try:
            answer = await self._client.call_api(*parameters, _request_timeout=self._timeout)
            data: bytes = await answer.read()  # type: ignore[no-untyped-call]
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ApiError(0, "Unreachable", f"the API server does not answer ({type(error).__name__})") from None
        if answer.status < 400:
            return data
        document = _document(data)
        reason, message = str(document.get("reason", "")), str(document.get("message", ""))[:500]
        kind = {404: NotFoundError, 409: ConflictError}.get(answer.status, ApiError)
        raise kind(answer.status, reason or str(answer.reason), message, _seconds(answer.headers.get("Retry-After")))


def _object(data: bytes) -> Manifest:
    document = _document(data)
    if not document:
        raise ApiError(0, "Unreadable", "the API server answered with something that is not an object")
    return document


def _document(data: bytes) -> Manifest:
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _seconds(header: str | None) -> float:
    return float(header) if header and header.isascii() and header.isdigit() else 0.0
