"""`kubectl sonoforge`: what a job does and why, its checkpoints and logs, and how to change it while it runs."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from kubernetes.aio import config as kube_config
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sonoforge_operator.cluster.api_client import (
    CHECKPOINTS,
    EVENTS,
    JOBS,
    PODS,
    Api,
    ApiError,
    Kind,
    Manifest,
    NotFoundError,
)
from sonoforge_operator.cluster.names import LABEL_ATTEMPT, LABEL_INDEX, LABEL_PART, LABEL_UID

Document = Mapping[str, Any]

_MANAGER = "kubectl-sonoforge"
"""Owner of the fields that a person changes with it, so that nobody takes them for the operator's."""
_ADVICE = {
    "Unschedulable": "no node has room: free GPUs, lower workers.minNodes, or look at the runtime's nodeSelector",
    "ImagePull": "the image cannot be pulled: check spec.images of the runtime and its pull secrets",
    "ContainerConfig": "a Secret or ConfigMap that the runtime names is missing in this namespace",
    "Refused": "the API server refuses a child of the job: correct the runtime, or ask for the quota or the right",
    "WaitingForQueue": "the queue has not admitted the job yet; see `kubectl get workloads`",
    "Rendezvous": "the workers do not find each other; see `kubectl sonoforge logs`",
    "Unreachable": "the coordinator does not answer; training goes on without it",
    "DataStarved": "the workers wait for data: look at the storage, or raise execution.loaderWorkers of the runtime",
    "Collective": "the workers wait for one of them; the operator starts them over by itself",
    "Checkpointing": "a checkpoint takes too long; look at the storage",
    "Invalid": "correct the field that the message names and apply again",
    "RuntimeNotFound": "apply the runtime, or name another",
    "SuiteNotFound": "apply the suite, or name another",
}


@dataclass(frozen=True)
class Place:
    """Where the commands work."""

    kubeconfig: str
    context: str | None
    namespace: str


@click.group("kubectl-sonoforge")
@click.option("--kubeconfig", envvar="KUBECONFIG", help="Connection file; default: ~/.kube/config.")
@click.option("--context", help="Context of the connection file; default: its current one.")
@click.option("-n", "--namespace", help="Namespace; default: the context's.")
@click.pass_context
def main(context_: click.Context, kubeconfig: str | None, context: str | None, namespace: str | None) -> None:
    """See and steer PretrainJobs."""
    file = (kubeconfig or "").split(os.pathsep)[0] or str(Path.home() / ".kube" / "config")
    if not Path(file).is_file():
        raise click.ClickException(f"no connection file {file}; set KUBECONFIG or give --kubeconfig")
    context_.obj = Place(file, context, namespace or _namespace_of(file, context))


@main.command()
@click.argument("job")
@click.pass_obj
def status(place: Place, job: str) -> None:
    """What a job does: phase, progress, time lost and conditions."""
    manifest = _run(place, lambda api: api.get(JOBS, place.namespace, job))
    known = _status(manifest)
    console = _console()
    console.print(f"{job}  {known.get('phase', 'Pending')}  {known.get('reason', '')}", highlight=False, markup=False)
    if known.get("message"):
        console.print(str(known["message"]), highlight=False, markup=False)
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in _facts(known):
        table.add_row(name, Text(value))
    console.print(table)
    conditions = Table(box=None, pad_edge=False)
    for title in ("CONDITION", "STATUS", "REASON", "SINCE", "MESSAGE"):
        conditions.add_column(title, overflow="fold")
    for condition in _list(known.get("conditions")):
        fields = ("type", "status", "reason", "lastTransitionTime", "message")
        conditions.add_row(*(Text(str(condition.get(field, ""))) for field in fields))
    console.print(conditions)


@main.command()
@click.argument("job")
@click.pass_obj
def checkpoints(place: Place, job: str) -> None:
    """The checkpoints of a job with their scores."""
    manifest = _run(place, lambda api: api.get(JOBS, place.namespace, job))
    found = _run(place, lambda api: _all(api, CHECKPOINTS, place.namespace, _of(manifest)))
    table = Table(box=None, pad_edge=False)
    for title in ("STEP", "SAMPLES", "STATE", "BEST", "SCORES", "URI"):
        table.add_column(title, overflow="fold", justify="right" if title in ("STEP", "SAMPLES") else "left")
    for checkpoint in sorted(found, key=lambda c: int(c["spec"].get("step", 0))):
        spec, known = checkpoint["spec"], _status(checkpoint)
        cells = (
            str(spec.get("step")),
            str(spec.get("samples")),
            str(known.get("phase", "Pending")) + (" (pruned)" if known.get("pruned") else ""),
            "best" if known.get("best") else "",
            str(known.get("scoresText", "")),
            str(spec.get("uri")),
        )
        table.add_row(*(Text(cell) for cell in cells))
    _console().print(table)


@main.command()
@click.argument("job")
@click.option("--rank", type=int, help="Only what this rank of the run says.")
@click.option("--attempt", type=int, help="Attempt; default: the current one.")
@click.option("--tail", default=200, show_default=True, help="Lines of each pod, from its end.")
@click.pass_obj
def logs(place: Place, job: str, rank: int | None, attempt: int | None, tail: int) -> None:
    """The logs of the workers, each line with its node; ranks change when a run re-forms, nodes do not."""
    manifest = _run(place, lambda api: api.get(JOBS, place.namespace, job))
    wanted = attempt or int(_status(manifest).get("attempt") or 1)
    selector = f"{_of(manifest)},{LABEL_PART}=worker,{LABEL_ATTEMPT}={wanted}"
    pods = _run(place, lambda api: _all(api, PODS, place.namespace, selector))
    if not pods:
        raise click.ClickException(f"attempt {wanted} of {job} has no pods (any more)")
    for pod in sorted(pods, key=lambda p: (int(_index(p) or 0), p["metadata"]["creationTimestamp"])):
        for line in _log_of(place, pod["metadata"]["name"], tail):
            if rank is None or _rank(line) == rank:
                click.echo(f"{_index(pod)} {line}")


@main.command()
@click.argument("job")
@click.option("--min", "min_nodes", type=int, help="Nodes below which the run waits.")
@click.option("--max", "max_nodes", type=int, help="Nodes up to which the run grows.")
@click.pass_obj
def resize(place: Place, job: str, min_nodes: int | None, max_nodes: int | None) -> None:
    """Change the number of nodes of a job. A running one saves a checkpoint and goes on with the new number."""
    wanted = {name: value for name, value in (("minNodes", min_nodes), ("maxNodes", max_nodes)) if value is not None}
    if not wanted:
        raise click.UsageError("give --min, --max or both")
    _change(place, job, {"workers": wanted})
    click.echo(f"{job}: " + ", ".join(f"{name} {value}" for name, value in wanted.items()))


@main.command()
@click.argument("job")
@click.pass_obj
def suspend(place: Place, job: str) -> None:
    """Have a job save a checkpoint and release its nodes."""
    _change(place, job, {"suspend": True})
    click.echo(f"{job}: asked to save a checkpoint, then to release its nodes")
    click.echo(f"`kubectl sonoforge resume {job}` goes on from the newest checkpoint")


@main.command()
@click.argument("job")
@click.pass_obj
def resume(place: Place, job: str) -> None:
    """Have a suspended job go on from its newest checkpoint."""
    _change(place, job, {"suspend": False})
    click.echo(f"{job}: resumed")


@main.command()
@click.argument("job")
@click.pass_obj
def why(place: Place, job: str) -> None:
    """Why a job does not do what you expect, and what to do about it."""
    manifest = _run(place, lambda api: api.get(JOBS, place.namespace, job))
    known = _status(manifest)
    if not known:
        click.echo("no operator has looked at this job yet: is one running for this namespace?")
        return
    reason = str(known.get("reason", ""))
    click.echo(f"{known.get('phase')}: {reason}: {known.get('message', '')}".rstrip(": "))
    if reason in _ADVICE:
        click.echo(f"  -> {_ADVICE[reason]}")
    if known.get("observedGeneration") != manifest["metadata"].get("generation"):
        click.echo("the newest change of the job was not looked at yet: is the operator running?")
    found = _run(place, lambda api: _all(api, CHECKPOINTS, place.namespace, _of(manifest)))
    for checkpoint in sorted(found, key=lambda c: int(c["spec"].get("step", 0))):
        for evaluation in _list(_status(checkpoint).get("evaluations")):
            if evaluation.get("phase") == "Failed":
                what = f"evaluation {evaluation.get('name')} of {checkpoint['spec'].get('id')}"
                click.echo(f"{what} failed: {evaluation.get('reason')}")
    about = f"type=Warning,involvedObject.uid={manifest['metadata']['uid']}"
    events = _run(place, lambda api: _all(api, EVENTS, place.namespace, fields=about))
    for event in sorted(events, key=lambda event: str(event.get("lastTimestamp")))[-5:]:
        times = f" ({event['count']} times)" if event.get("count", 1) > 1 else ""
        click.echo(f"{event.get('lastTimestamp')} {event.get('reason')}: {event.get('message')}{times}")


# --- parts ------------------------------------------------------------------------------------------------------------


def _run(place: Place, call: Callable[[Api], Awaitable[Any]]) -> Any:
    async def connected() -> Any:
        async with await Api.connect(place.kubeconfig, place.context, _MANAGER) as api:
            return await call(api)

    try:
        return asyncio.run(connected())
    except NotFoundError:
        raise click.ClickException(
            f"not found in namespace {place.namespace}; see `kubectl get pretrainjobs`"
        ) from None
    except ApiError as error:
        raise click.ClickException(str(error)) from None


def _change(place: Place, job: str, spec: Manifest) -> None:
    _run(place, lambda api: api.merge(JOBS, place.namespace, job, {"spec": spec}))


def _log_of(place: Place, pod: str, tail: int) -> list[str]:
    """Lines of a pod. One that has not started has none, and says so instead of hiding the others'."""

    async def read(api: Api) -> list[str]:
        try:
            return (await api.logs(place.namespace, pod, tail=tail)).splitlines()
        except ApiError as error:
            if error.status != 400:  # the kubelet has no log of it yet
                raise
            return []

    found: list[str] = _run(place, read)
    if not found:
        click.echo(f"{pod}: has not written anything", err=True)
    return found


async def _all(api: Api, kind: Kind, namespace: str, selector: str = "", fields: str = "") -> list[Manifest]:
    return [found async for found in api.list(kind, namespace, selector=selector, fields=fields)]


def _namespace_of(file: str, context: str | None) -> str:
    contexts, current = kube_config.list_kube_config_contexts(config_file=file)  # type: ignore[no-untyped-call]
    chosen = next((c for c in contexts if c["name"] == context), None) if context else current
    if chosen is None:
        raise click.ClickException(f"--context: found {context!r}. Allowed: {', '.join(c['name'] for c in contexts)}")
    return str(chosen["context"].get("namespace") or "default")


def _facts(known: Document) -> Iterable[tuple[str, str]]:
    goodput = known.get("goodput") or {}
    lost = goodput.get("lostSeconds") or {}
    total = goodput.get("productiveSeconds", 0) + sum(lost.values())
    newest = known.get("lastCheckpoint") or {}
    yield "nodes", str(known.get("nodesText", ""))
    yield "step", f"{known.get('step', 0)} of {known.get('steps', 0)} ({known.get('progressText', '')})"
    yield "eta", str(known.get("eta", ""))
    yield "throughput", str(known.get("throughputText", ""))
    yield "loss", str(known.get("lossText", ""))
    yield "newest checkpoint", f"{newest.get('name', 'none')} {newest.get('time', '')}".strip()
    yield "best", str(known.get("bestText", ""))
    yield "restarts", ", ".join(f"{cause} {n}" for cause, n in sorted((known.get("restarts") or {}).items())) or "none"
    yield "steps done again", str(known.get("lostSteps", 0))
    if total:
        by_cause = ", ".join(f"{cause} {seconds:.0f} s" for cause, seconds in sorted(lost.items()) if seconds >= 1)
        yield "goodput", f"{100 * goodput.get('productiveSeconds', 0) / total:.1f} %  (lost: {by_cause or 'nothing'})"


def _of(manifest: Document) -> str:
    return f"{LABEL_UID}={manifest['metadata']['uid']}"


def _status(manifest: Document) -> Document:
    found = manifest.get("status")
    return found if isinstance(found, Mapping) else {}


def _list(value: object) -> list[Document]:
    return [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list) else []


def _index(pod: Document) -> str:
    return str((pod["metadata"].get("labels") or {}).get(LABEL_INDEX, ""))


def _rank(line: str) -> int | None:
    try:
        found = json.loads(line).get("rank")
    except (ValueError, AttributeError):
        return None
    return int(found) if str(found).isdecimal() else None


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 160)


if __name__ == "__main__":
    main()
