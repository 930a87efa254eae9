"""The agent of one node: torch's local agent with the policies that torch leaves out.

* Workers are started again in place only where that is the answer (a peer was lost, or they were told to leave); any
  other failure ends the agent, because budgets for failures belong to the operator.
* Workers of a group that lost a member get little time to end: they can no longer agree on anything. When a node joins
  they get the time they need to save.
* The wait for other agents at the end follows the membership, so that an agent lost there holds up nobody.
"""

from __future__ import annotations

import signal
import time
from typing import Any

import structlog
from torch.distributed.elastic.agent.server.api import RunResult, Worker, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousConnectionError

from sonoforge_trainer import termination
from sonoforge_trainer.contract import Termination
from sonoforge_trainer.rendezvous import ElasticHandler
from sonoforge_trainer.worker import START_METHOD

_ASSIGNMENT_ATTEMPTS = 20

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class NodeAgent(LocalElasticAgent):
    """Runs the workers of one node. `failure` says why they ended, once `run` returned a failed result.

    `shutdown_seconds` is what workers get to save when told to leave, `lost_seconds` when a peer is gone.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        handler: ElasticHandler,
        *,
        shutdown_seconds: int,
        lost_seconds: int,
        exit_barrier_seconds: float,
    ) -> None:
        super().__init__(
            spec=spec,
            logs_specs=DefaultLogsSpecs(),
            start_method=START_METHOD,
            exit_barrier_timeout=exit_barrier_seconds,
            shutdown_timeout=shutdown_seconds,
        )
        self._handler = handler
        self._lost_seconds = lost_seconds
        self.failure: Termination | None = None

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        for attempt in range(_ASSIGNMENT_ATTEMPTS):
            try:
                super()._rendezvous(worker_group)
            except RendezvousConnectionError as error:
                # A peer or the store was lost while ranks were being assigned; another round settles it.
                if attempt == _ASSIGNMENT_ATTEMPTS - 1:
                    raise
                log.warning("rank-assignment-retry", exception=type(error).__name__)
            else:
                log.info("group-formed", node_rank=worker_group.group_rank, nodes=worker_group.group_world_size)
                return

    def _assign_worker_ranks(
        self, store: Any, group_rank: int, group_world_size: int, spec: WorkerSpec
    ) -> list[Worker]:
        counts = [int(count) for count in self._handler.exchange(str(spec.local_world_size))]
        first, total = sum(counts[:group_rank]), sum(counts)
        return [
            Worker(
                local_rank=local,
                global_rank=first + local,
                role_rank=first + local,
                world_size=total,
                role_world_size=total,
            )
            for local in range(spec.local_world_size)
        ]

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED:
            self.failure = _root_cause(result)
            again = termination.restartable(self.failure) and self._remaining_restarts > 0
            log.warning(
                "workers-failed", again=again, **self.failure.model_dump(include={"cause", "exception", "rank", "step"})
            )
            if not again:
                self._remaining_restarts = 0
        elif result.state == WorkerState.UNHEALTHY:
            self.failure = Termination(cause="application", message="A worker is stuck in a call that cannot end.")
        return result

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        healthy = worker_group.state == WorkerState.HEALTHY
        joining = healthy and self._handler.intact()
        reason = "a node joins" if joining else "a node is gone" if healthy else "workers failed"
        log.info("workers-stop", reason=reason)
        if self._pcontext is not None:
            self._pcontext.close(signal.SIGTERM, self._shutdown_timeout if joining else self._lost_seconds)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        # A second SIGTERM must not interrupt the wait for workers that are saving.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        super()._shutdown(death_sig, timeout)

    def _exit_barrier(self) -> None:
        began = time.monotonic()
        complete = self._handler.finish(self._exit_barrier_timeout)
        log.info("workers-finished", all_nodes=complete, waited_seconds=round(time.monotonic() - began, 1))


def _root_cause(result: RunResult) -> Termination:
    records: list[tuple[float, Termination]] = []
    for rank, failure in result.failures.items():
        record: dict[str, Any] = failure.error_file_data
        when = float(record.get("time", failure.timestamp))
        records.append((when, termination.of_worker(failure.exitcode, record, rank)))
    return termination.first(records)
