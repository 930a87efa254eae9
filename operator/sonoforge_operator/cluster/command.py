"""`sonoforge operator`: watch PretrainJobs and make true what they ask for."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import sys
import time
import traceback
from collections.abc import Awaitable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import click
import kopf
import structlog

from sonoforge_operator.cluster.api_client import JOBS, Api, ApiError
from sonoforge_operator.cluster.coordinators import DEFAULT_URL, Coordinators
from sonoforge_operator.cluster.freshness import STALE_SECONDS, Freshness
from sonoforge_operator.cluster.handlers import Wiring, registry_of, settings
from sonoforge_operator.cluster.jobs import Site
from sonoforge_operator.cluster.leadership import Leadership, LeadershipLostError, Timing
from sonoforge_operator.cluster.logs import configure
from sonoforge_operator.cluster.metrics import Metrics
from sonoforge_operator.cluster.port import ClusterPort
from sonoforge_operator.cluster.probes import State, probes
from sonoforge_operator.cluster.queue import Queue
from sonoforge_operator.cluster.reconciler import Reconciler
from sonoforge_operator.cluster.store import Store, key_of

log = structlog.get_logger(__name__)

_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_PASSES = 32
"""Passes at once. Most of them wait for what a run says; few write, see Reconciler."""
_COMPARE_SECONDS = 600.0
_CANCELLATIONS, _CANCEL_SECONDS = 5, 1.0
_LOST = 70
"""Exit code of a replica that lost the Lease: whatever it was about to do, it does not do any more."""


@dataclass(frozen=True)
class Options:
    """How the operator is started."""

    namespaces: tuple[str, ...]
    """Namespaces whose jobs it serves; empty for all."""
    own_namespace: str
    """Where its Lease is."""
    kubeconfig: str | None
    """File of the connection; None inside a cluster."""
    image: str
    """Image of the trainer where a runtime names none."""
    key: bytes
    """What the tokens for coordinators follow from."""
    coordinator_url: str
    """Where coordinators answer."""
    host: str
    port: int
    """Where probes and metrics are served; port 0 for none."""
    poll_seconds: float
    """Time between two looks at the progress of a run."""
    watch_silence_seconds: float
    """Time after which a silent watch is made anew. The API server says something every minute."""
    stale_seconds: float
    """Without a heartbeat through the watch for so long, the operator is not healthy."""
    stuck_seconds: float
    """With a pass that lasts for so long, or none that ends although some are due, the operator is not healthy."""
    timing: Timing
    """Times of its Lease."""
    identity: str
    """Name of this replica."""


@click.command("operator", short_help="Watch PretrainJobs in a cluster.")
@click.option("--namespace", "namespaces", multiple=True, metavar="NAME", help="Serve this namespace; may be repeated.")
@click.option("--all-namespaces", is_flag=True, help="Serve every namespace (needs cluster-wide rights).")
@click.option("--own-namespace", envvar="POD_NAMESPACE", help="Namespace of the Lease; default: the pod's.")
@click.option(
    "--identity", envvar="POD_UID", default="", help="Name of this replica in the Lease, kept by a restarted container."
)
@click.option("--kubeconfig", envvar="KUBECONFIG", help="Connection file; default: the pod's service account.")
@click.option("--image", envvar="SONOFORGE_TRAINER_IMAGE", default="", help="Trainer image where a runtime names none.")
@click.option(
    "--key-file",
    envvar="SONOFORGE_KEY_FILE",
    type=click.Path(path_type=Path),
    help="File with 16 secret bytes or more; tokens for coordinators follow from it. Without it a key is drawn.",
)
@click.option("--coordinator-url", default=DEFAULT_URL, show_default=True, help="Where coordinators answer.")
@click.option("--host", default="0.0.0.0", show_default=True, help="Address of probes and metrics.")  # noqa: S104 - a pod's
@click.option("--port", default=8080, show_default=True, help="Port of probes and metrics; 0 serves none.")
@click.option("--poll-seconds", default=2.0, show_default=True, help="Time between two looks at a run's progress.")
@click.option(
    "--watch-silence-seconds", default=70.0, show_default=True, help="A watch that is silent for so long is made anew."
)
@click.option(
    "--stale-seconds", default=STALE_SECONDS, show_default=True, help="Not healthy where watches tell nothing so long."
)
@click.option(
    "--stuck-seconds", default=300.0, show_default=True, help="Not healthy where a pass lasts so long, or none ends."
)
@click.option("--lease-seconds", default=Timing.lease_seconds, show_default=True, help="How long its Lease holds.")
@click.option(
    "--renew-seconds", default=Timing.renew_seconds, show_default=True, help="It ends where it cannot renew it so long."
)
@click.option(
    "--retry-seconds", default=Timing.retry_seconds, show_default=True, help="Time between two tries to hold it."
)
def command(
    namespaces: tuple[str, ...],
    all_namespaces: bool,
    own_namespace: str | None,
    identity: str,
    kubeconfig: str | None,
    image: str,
    key_file: Path | None,
    coordinator_url: str,
    host: str,
    port: int,
    poll_seconds: float,
    watch_silence_seconds: float,
    stale_seconds: float,
    stuck_seconds: float,
    lease_seconds: int,
    renew_seconds: float,
    retry_seconds: float,
) -> None:
    """Serve the PretrainJobs of one or several namespaces, until SIGTERM. Only one replica acts at a time."""
    if namespaces and all_namespaces:
        raise click.UsageError("give --namespace or --all-namespaces, not both")
    try:
        timing = Timing(lease_seconds, renew_seconds, retry_seconds)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    own = own_namespace or _pod_namespace()
    configure()
    options = Options(
        namespaces=() if all_namespaces else namespaces or (own,),
        own_namespace=own,
        kubeconfig=kubeconfig,
        image=image,
        key=_key(key_file),
        coordinator_url=coordinator_url,
        host=host,
        port=port,
        poll_seconds=poll_seconds,
        watch_silence_seconds=watch_silence_seconds,
        stale_seconds=stale_seconds,
        stuck_seconds=stuck_seconds,
        timing=timing,
        # A pod has one operator at a time, so that the next container of it need not wait until its Lease runs out.
        identity=identity or f"{socket.gethostname()}-{secrets.token_hex(4)}",
    )
    if kubeconfig:
        os.environ["KUBECONFIG"] = kubeconfig  # kopf connects by itself
    asyncio.run(_serve_and_end(options))


class WatchesEndedError(Exception):
    """kopf gave up: a restart begins with everything that is there."""

    def __init__(self, cause: str) -> None:
        super().__init__(f"the watches ended by themselves: {cause}")
        self.cause = cause
        """Name of what kopf raised."""


async def _serve_and_end(options: Options) -> NoReturn:
    """Serve, then end the process with what is left of kopf in it.

    kopf cancels its tasks once and waits for them without limit, as asyncio does at the end of a loop, and one
    cancellation can get lost: a watch that waits for new credentials takes it for a pause where the pause was cancelled
    in the same moment, and begins again. Nothing of it has to be ended in order: it only reads.
    """
    code = 1
    try:
        await serve(options)
        code = 0
    except WatchesEndedError as error:
        log.error("watches-ended", exception=error.cause)  # noqa: TRY400 - what it holds is for no log
    except BaseException:  # noqa: BLE001 - whatever it is, the process ends
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)


async def serve(options: Options) -> None:
    """Win the Lease, then watch and reconcile until SIGTERM. Raises WatchesEndedError.

    A replica that loses the Lease ends the process at once, with the exit code 70.
    """
    told = asyncio.Event()
    _listen(told)
    loop = asyncio.get_running_loop()
    metrics, store = Metrics(), Store()
    site = Site(default_image=options.image, operator_namespace=options.own_namespace)
    async with (
        await Api.connect(options.kubeconfig) as api,
        await Api.connect(options.kubeconfig) as lease_api,  # no renewal waits behind other requests
        Coordinators(options.key, options.coordinator_url) as coordinators,
    ):
        queue = Queue(clock=loop.time)
        port = ClusterPort(api, store, coordinators)
        reconciler = Reconciler(port, store, coordinators, site, metrics, poll_seconds=options.poll_seconds)
        wiring = Wiring(store, queue, reconciler, options.namespaces)
        watched: tuple[str | None, ...] = options.namespaces or (None,)
        freshness = Freshness(
            *(api, store, watched, metrics, wiring.wake), steady=time.monotonic, stale_seconds=options.stale_seconds
        )
        leadership = Leadership(
            *(lease_api, options.own_namespace, options.identity),
            clock=time.time,
            steady=time.monotonic,
            timing=options.timing,
        )
        api.may_write = lambda: leadership.left > 0
        state = State(freshness, queue, reconciler, metrics, api, options.stuck_seconds)
        async with probes(state, options.host, options.port):
            if not await _first(told.wait(), leadership.win()):
                return
            metrics.leading.set(1)
            try:
                await _first(
                    told.wait(),
                    _hold_or_end(leadership),
                    _work(options, state, wiring, told),
                )
            finally:
                metrics.leading.set(0)
                api.may_write = lambda: False
                with contextlib.suppress(Exception):
                    await asyncio.wait_for(leadership.release(), options.timing.retry_seconds)


def _listen(told: asyncio.Event) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)


async def _hold_or_end(leadership: Leadership) -> None:
    """Hold the Lease. Without it the process ends at once: another one acts, and nothing here may be finished."""
    try:
        await leadership.hold()
    except LeadershipLostError as error:
        log.error("leadership-lost", message=str(error))  # noqa: TRY400 - the message says it all
        sys.stdout.flush()
        os._exit(_LOST)


async def _work(options: Options, state: State, wiring: Wiring, told: asyncio.Event) -> None:
    """Learn what is there, then watch and make passes until cancelled."""
    freshness, store = state.freshness, wiring.store
    began = time.monotonic()
    while True:
        try:
            await freshness.fill()
            break
        except ApiError as error:  # the server starts, or the custom resources are not there yet
            log.warning("not-listed", status=error.status, reason=error.reason, message=error.message)
            await asyncio.sleep(max(error.retry_after, options.timing.retry_seconds))
    for job in store.all(JOBS.name):
        wiring.wake(JOBS, key_of(job))
    freshness.beat()
    state.started = True
    log.info("ready", jobs=sum(1 for _ in store.all(JOBS.name)), seconds=round(time.monotonic() - began, 2))
    registry = registry_of(wiring, lambda: freshness, options.own_namespace)
    namespaces = {*options.namespaces, options.own_namespace} if options.namespaces else ()
    watches = await kopf.spawn_tasks(
        registry=registry,
        settings=settings(options.watch_silence_seconds),
        standalone=True,
        clusterwide=not options.namespaces,
        namespaces=namespaces,
    )
    _listen(told)  # kopf took the signals for itself, and would end without a word to the rest
    passes = [state.queue.work(state.reconciler.reconcile) for _ in range(_PASSES)]
    try:
        await _first(_end_of(watches), freshness.keep(_COMPARE_SECONDS), *passes)
    except Exception as error:
        raise WatchesEndedError(type(error).__name__) from error
    raise WatchesEndedError("nothing")


async def _end_of(watches: Collection[asyncio.Task[object]]) -> None:
    """Wait until one of them ends, and raise what it raised."""
    done, _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        if not task.cancelled():
            task.result()


async def _first(*coroutines: Awaitable[object]) -> bool:
    """Run until one ends, then end the others. Whether it was not the first that ended. Raises what that one raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        return tasks[0] not in done
    finally:
        await _end(tasks)


async def _end(tasks: Iterable[asyncio.Task[object]]) -> None:
    """Cancel what runs, again and again for a while: a cancellation can get lost, for example in asyncio.wait_for."""
    left = set(tasks)
    for _ in range(_CANCELLATIONS):
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_CANCEL_SECONDS)
        if not left:
            return
    log.error("tasks-left", count=len(left))


def _pod_namespace() -> str:
    try:
        return _NAMESPACE_FILE.read_text().strip() or "default"
    except OSError:
        return "default"


def _key(file: Path | None) -> bytes:
    if file is None or not file.exists():
        log.warning("no-key-file", message="a restart of the operator then needs a minute to be let in by coordinators")
        return secrets.token_bytes(32)
    try:
        key = file.read_bytes().strip()
    except OSError as error:
        raise click.ClickException(f"--key-file {file}: cannot be read ({error.strerror})") from None
    if len(key) < 16:
        raise click.ClickException(f"--key-file {file}: holds {len(key)} bytes. Allowed: 16 or more")
    return key


if __name__ == "__main__":
    sys.exit(command())
