"""The entry of a worker pod: `python -m sonoforge_trainer.launch`, one elastic agent and its worker processes.

It is torchrun with our rendezvous, our agent and honest endings: the exit code is the class of the failure, SIGTERM
ends with 143, and the termination message carries no text of foreign exceptions.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import structlog

from sonoforge_trainer import logs, termination, worker
from sonoforge_trainer.contract import ENV_ATTEMPT, ENV_CONFIG, ENV_STORE, ExitCode, Termination

if TYPE_CHECKING:
    from sonoforge_trainer.agent import NodeAgent
    from sonoforge_trainer.rendezvous import ElasticHandler

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sonoforge_trainer.launch", description=__doc__)
    env = os.environ.get
    add = parser.add_argument
    add("--config", default=env(ENV_CONFIG), help=f"the run's configuration file ({ENV_CONFIG})")
    add("--nodes", required=True, metavar="MIN:MAX", help="agents that take part")
    add("--nproc-per-node", type=int, default=1, help="worker processes of this agent")
    add("--endpoint", default=env(ENV_STORE), metavar="HOST:PORT", help=f"the coordinator's store ({ENV_STORE})")
    add("--attempt", default=env(ENV_ATTEMPT), help=f"identity of the attempt, new for each ({ENV_ATTEMPT})")
    add("--local-addr", required=True, help="address or zero-padded name at which other nodes reach this one")
    add("--job", default="", help="name of the job, for logs")
    add("--keep-alive", type=float, default=2.0, metavar="SECONDS", help="time between heartbeats")
    add("--keep-alive-misses", type=int, default=3, help="heartbeats missed before a node counts as lost")
    add("--first-call", type=float, default=15.0, metavar="SECONDS", help="wait for more nodes than MIN at the start")
    add("--last-call", type=float, default=5.0, metavar="SECONDS", help="the same later, unless a node was lost")
    add("--join-timeout", type=float, default=900.0, metavar="SECONDS", help="wait for MIN nodes")
    add("--store-outage", type=float, default=600.0, metavar="SECONDS", help="how long to go on without the store")
    add("--shutdown-timeout", type=int, default=30, metavar="SECONDS", help="workers' time to save before SIGKILL")
    add("--lost-timeout", type=int, default=3, metavar="SECONDS", help="workers' time to end after a node was lost")
    add("--exit-barrier", type=float, default=300.0, metavar="SECONDS", help="wait for other agents at the end")
    add("--max-restarts", type=int, default=1000, help="group re-formations after failures; budgets are the operator's")
    add("--worker", default="sonoforge_trainer.train", metavar="MODULE", help="module that each worker runs")
    add("worker_arguments", nargs="*", metavar="-- ARGUMENT", help="passed to the worker")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run an agent until its workers are done. Returns the exit code, an ExitCode."""
    options = _parser().parse_args(arguments)
    for name, value in {"--endpoint": options.endpoint, "--attempt": options.attempt}.items():
        if not value:
            return _end(Termination(cause="config", message=f"Give {name} or its environment variable."))
    _prepare_environment(options)
    context = {"job": options.job, "attempt": options.attempt, "node": options.local_addr}
    logs.configure(**context)
    worker.prepare(options.worker)
    signal.signal(signal.SIGTERM, _raise_signal)
    try:
        agent, handler = _build(options, context)
        return _run(agent, handler)
    except _ToldToEndError:
        return _end(Termination(cause="terminated", message="Ended by SIGTERM before workers ran."))
    except ValueError as error:  # of torch's parsers and ours, about the options alone
        return _end(Termination(cause="config", message=str(error), exception=type(error).__name__))


def _run(agent: NodeAgent, handler: ElasticHandler) -> int:
    from torch.distributed.elastic.agent.server.api import WorkerState
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError

    try:
        result = agent.run()
    except _ToldToEndError:
        handler.leave()
        raise
    except SignalException as ended:
        handler.leave()  # not closed: the others go on without this node
        return _end(
            Termination(cause="terminated", message=f"Ended by {ended.sigval.name}; workers were told to save.")
        )
    except RendezvousClosedError:
        if handler.is_finished():
            log.info("nothing-left-to-do")
            return ExitCode.OK
        return _end(Termination(cause="collective", message="The attempt was ended by another node."))
    except RendezvousError as error:
        handler.leave()
        message = f"Lost the other nodes or the coordinator: {error}"
        return _end(Termination(cause="collective", message=message, exception=type(error).__name__))
    except (KeyboardInterrupt, Exception) as error:  # noqa: BLE001 - the last frame: every ending gets its class
        handler.leave()
        return _end(termination.classify(error))
    if result is not None and result.state != WorkerState.SUCCEEDED:
        assert agent.failure is not None
        handler.shutdown()
        handler.leave()  # the others find the attempt closed, and need not miss heartbeats to look
        return _end(agent.failure)
    handler.close_finished()
    return ExitCode.OK


def _build(options: argparse.Namespace, context: dict[str, str]) -> tuple[NodeAgent, ElasticHandler]:
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.rendezvous import RendezvousParameters

    from sonoforge_trainer.agent import NodeAgent
    from sonoforge_trainer.rendezvous import BACKEND, ElasticHandler, create_handler

    logs.adopt_torch()
    minimum, _, maximum = options.nodes.partition(":")
    handler = create_handler(
        RendezvousParameters(
            BACKEND,
            options.endpoint,
            options.attempt,
            int(minimum),
            int(maximum or minimum),
            options.local_addr,
            keep_alive_interval=options.keep_alive,
            keep_alive_max_attempt=options.keep_alive_misses,
            first_call_timeout=options.first_call,
            last_call_timeout=options.last_call,
            join_timeout=options.join_timeout,
            store_outage=options.store_outage,
        )
    )
    assert isinstance(handler, ElasticHandler)
    spec = WorkerSpec(
        role="trainer",
        local_world_size=options.nproc_per_node,
        entrypoint=worker.run,
        args=(context, options.worker, *options.worker_arguments),
        rdzv_handler=handler,
        max_restarts=options.max_restarts,
        local_addr=options.local_addr,
    )
    agent = NodeAgent(
        spec,
        handler,
        shutdown_seconds=options.shutdown_timeout,
        lost_seconds=options.lost_timeout,
        exit_barrier_seconds=options.exit_barrier,
    )
    return agent, handler


def _prepare_environment(options: argparse.Namespace) -> None:
    """What workers inherit. Set before torch is loaded, because torch reads its log levels when it is."""
    os.environ[ENV_STORE] = options.endpoint
    os.environ[ENV_ATTEMPT] = options.attempt
    if options.config:
        os.environ[ENV_CONFIG] = options.config
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # torch writes a C++ stack to stderr for each failed call on a store, and here such failures are expected.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP")
    if options.local_addr.startswith("127.") and Path("/sys/class/net/lo").exists():
        # gloo takes the interface of the host's name unless told otherwise.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


class _ToldToEndError(BaseException):
    """SIGTERM before workers run. torch's own exception cannot be loaded from inside a signal handler."""


def _raise_signal(number: int, frame: FrameType | None) -> None:
    raise _ToldToEndError


def _end(ending: Termination) -> int:
    log.warning("agent-ends", **ending.model_dump(exclude={"result"}, exclude_none=True))
    termination.write(ending)
    return termination.exit_code(ending)


if __name__ == "__main__":
    sys.exit(main())
