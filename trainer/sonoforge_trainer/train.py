"""A worker process: joins the others, continues from the newest checkpoint, trains, and leaves when it is told to.

What every process must agree on (to stop, to save) travels in the step's one reduction and is read one step later, so
that all of them act on it after the same step and the device never waits for the host.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import structlog

from sonoforge_trainer import logs, termination
from sonoforge_trainer.card import model_card
from sonoforge_trainer.checkpoint import (
    CheckpointStore,
    CheckpointWriter,
    Peers,
    RunIdentity,
    SaveResult,
    Snapshot,
    fresh_attempt,
    restore,
)
from sonoforge_trainer.checkpointing import Checkpointing
from sonoforge_trainer.contract import (
    ENV_ATTEMPT,
    ENV_CONFIG,
    ENV_IMAGE,
    ENV_STORE,
    Activity,
    CheckpointRef,
    ContractError,
    ExitCode,
    RunConfig,
    ShardManifest,
    TrainConfig,
    load_yaml,
)
from sonoforge_trainer.coordinator_client import ProgressPublisher
from sonoforge_trainer.divergence import Divergence
from sonoforge_trainer.journal import Journal
from sonoforge_trainer.ranks import Ranks
from sonoforge_trainer.redact import KeyHasher
from sonoforge_trainer.state import TrainState
from sonoforge_trainer.step import Step, StepOutput, StepReport
from sonoforge_trainer.storage import Storage
from sonoforge_trainer.stream import Stream
from sonoforge_trainer.weights.fit import fitted_to
from sonoforge_trainer.weights.loading import load_weights
from sonoforge_trainer.wishes import StopRequestedError, Wishes

log = structlog.get_logger(__name__)


@dataclass
class Told:
    """Whether this process was told to stop."""

    stop: bool = False
    """True from the first signal on."""

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Remember; the next step tells the others."""
        self.stop = True


def main() -> int:
    """Run one worker process, configured by the environment. Returns an ExitCode.

    Under an agent, `worker.py` has set up its logs and tied its life to the agent's; it runs as well without one.
    """
    if not structlog.is_configured():
        logs.configure(rank=os.environ.get("RANK", "0"))
        logs.adopt_torch()
    told = Told()
    signal.signal(signal.SIGTERM, told.on_signal)
    signal.signal(signal.SIGINT, told.on_signal)
    run: Run | None = None
    ranks: Ranks | None = None
    try:
        config = read_config(os.environ)
        ranks = Ranks.from_env(config.execution)
        with ExitStack() as exits:
            exits.callback(ranks.close)
            run = Run(config, ranks, told, exits)
            return run.train()
    except Exception as error:  # noqa: BLE001 - the last frame: every ending gets its class
        where = {"rank": ranks.rank if ranks else None, "step": run.step if run else None}
        fault = run.fault if run else ""
        if not isinstance(error, StopRequestedError):
            ending = termination.classify(error, **where, fault=fault)
            log.error("worker-failed", **ending.model_dump(exclude={"result"}, exclude_none=True))  # noqa: TRY400 - a stack may hold paths
        return termination.report(error, **where, fault=fault)


def read_config(environ: Mapping[str, str]) -> RunConfig:
    """The RunConfig named by the environment. Raises ContractError."""
    path = environ.get(ENV_CONFIG)
    if not path:
        raise ContractError(f"{ENV_CONFIG}: not set; give it the path of the run's configuration file")
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ContractError(f"{ENV_CONFIG}: the file cannot be read ({reason})") from None
    return RunConfig.parse(load_yaml(text, where="configuration"), where="configuration")


def read_manifest(config: RunConfig, storage: Storage) -> ShardManifest:
    """The data set's manifest, which must be the expected one. Raises ContractError, StorageError."""
    data = config.training.data
    manifest = ShardManifest.from_json(storage.read(data.shards), where=data.shards, show_values=False)
    if data.dataset_digest and data.dataset_digest != manifest.dataset_digest:
        raise ContractError(
            f"training.data.datasetDigest: found {data.dataset_digest}. Allowed: {manifest.dataset_digest}, the digest "
            f"of {data.shards}; if that is not what you expect, the images were changed"
        )
    return manifest


def start(state: TrainState, training: TrainConfig, storage: Storage) -> None:
    """Put a new state where the run starts: at the weights of `training.init`, if there are any.

    Every process reads the file, so all have the same. Raises ContractError, WeightsError, StorageError.
    """
    init = training.init
    if init is None:
        return
    weights = load_weights(init.uri, storage, sha256=init.sha256, mean=init.mean, std=init.std)
    state.start_from(fitted_to(weights, training).tensors)
    log.info("started-from-weights", layout=weights.translated.layout, sha256=weights.sha256)


def _publisher(endpoint: str) -> ProgressPublisher:
    """Rank 0's: agents know its node by the address that torchrun gives to all ranks."""
    attempt, address = os.environ.get(ENV_ATTEMPT, ""), os.environ.get("MASTER_ADDR", "")
    return ProgressPublisher(endpoint, attempt=attempt, address=address)


class Run:
    """One process of one process group, from joining to leaving."""

    def __init__(self, config: RunConfig, ranks: Ranks, told: Told, exits: ExitStack) -> None:
        """Load the data set's manifest and the newest checkpoint. All processes call it together.

        `exits` closes what this opens. Raises ContractError, StorageError, CheckpointError.
        """
        self.training, self.ranks, self.told = config.training, ranks, told
        self.step = 0
        """Optimiser steps done."""
        self._execution = config.execution
        self._pending: StepOutput | None = None
        self._settled: StepReport | None = None
        self._divergence = Divergence()
        storage = Storage.from_env()
        self._manifest = read_manifest(config, storage)
        attempt = ranks.agree("attempt", fresh_attempt())
        endpoint = os.environ.get(ENV_STORE) if ranks.rank == 0 else None
        publisher = exits.enter_context(_publisher(endpoint)) if endpoint else None
        self._wishes = Wishes(publisher, attempt)
        self._journal = Journal(config, ranks, attempt, self._manifest, publisher)
        self._journal.publish(Activity.STARTING, self.step)

        self._state = TrainState(self.training, ranks.device)
        identity = RunIdentity.of(config, self._manifest.dataset_digest, os.environ.get(ENV_IMAGE, ""))
        peers = Peers(ranks.rank, ranks.world_size, ranks.store, ranks.control)
        restored = self._restore(CheckpointStore(storage, config.checkpoints.uri, identity), peers, attempt)
        exits.callback(self._journal.close)
        self._writer = CheckpointWriter(
            storage,
            config.checkpoints.uri,
            identity,
            attempt,
            peers,
            restored=restored,
            device=ranks.device,
        )
        exits.callback(self._writer.close)
        self._checkpointing = Checkpointing(
            config,
            self._writer,
            self._snapshot,
            committed=self._committed,
            failed=lambda: self._wishes.ask_again(self.step),
            restored_step=restored.step if restored else None,
        )
        base_uri = self.training.data.shards.rpartition("/")[0]
        self._stream = exits.enter_context(
            Stream(self._manifest, base_uri, self.training, config.execution, storage, KeyHasher.from_env())
        )

    def _restore(self, checkpoints: CheckpointStore, peers: Peers, attempt: str) -> CheckpointRef | None:
        loaded = restore(checkpoints, peers, attempt)
        if loaded:
            self._state.load_tensors(loaded.tensors)
            self.step = loaded.ref.step
            log.info("restored", id=loaded.ref.id, step=self.step, world_size=self.ranks.world_size)
        else:
            start(self._state, self.training, checkpoints.storage)
        first = self.ranks.rank == 0
        self._journal.begin(
            loaded.ref.step if loaded else None,
            checkpoints.committed() if first else (),
            checkpoints.quarantined() if first else (),
        )
        return loaded.ref if loaded else None

    @property
    def fault(self) -> str:
        """What the driver says is wrong with the GPU; empty where it says nothing."""
        return self._journal.fault

    def train(self) -> ExitCode:
        """Train to the end of the budget, or until any process is told to stop. Returns OK or TERMINATED.

        Raises StopRequestedError where the run was asked to stop, and whatever ends a run early.
        """
        steps, clock, checkpointing = self.training.recipe.steps, self._journal.clock, self._checkpointing
        step = Step(self.training, self._state, self.ranks, self._execution)
        batches = self._stream.batches(self.step, self.ranks.virtual_ranks(self.training.recipe.virtual_ranks))
        if self.step == 0 and not checkpointing.restored:
            checkpointing.save(0)  # the random initialisation: what every later checkpoint is compared with
        while self.step < steps:
            clock.begin()
            batch = next(batches)
            clock.ready()
            self._wishes.hear(self.step)
            output = step(
                batch,
                self.step,
                stop=self.told.stop or self._wishes.stop,
                checkpoint=self._asks_for_checkpoint(),
                busy=self._writer.busy(),
            )
            agreed = self._settle()  # the step before this one: what it agreed on, while this one runs
            self._pending = output
            self.step += 1
            if self._execution.record_samples:
                self._journal.keep_samples(self.step, self._stream.sample_log_lines(batch))
            clock.end()
            if agreed and agreed.stop and self.step < steps:
                return self._leave()
            checkpointing.follow(self.step, agreed)
            self._publish(Activity.TRAINING)
        self._save_together()
        self._wishes.stopped()
        self._publish(Activity.FINISHED)
        log.info("finished", step=self.step)
        return ExitCode.OK

    def _leave(self) -> ExitCode:
        """Save where everybody stands, then go."""
        self._save_together()
        # Every agent has to know whether its workers may be started again.
        asked = self.ranks.agree("leaving", "asked" if self._wishes.stop else "told") == "asked"
        self._wishes.stopped()
        self._publish(Activity.STOPPED)
        log.info("stopped", step=self.step, asked=asked)
        if asked:
            raise StopRequestedError(f"saved step {self.step} and left, as the run was asked to stop")
        return ExitCode.TERMINATED

    def _save_together(self) -> None:
        """Have the checkpoint of this step committed. Nobody leaves before all know: one may host what they ask."""
        self._publish(Activity.CHECKPOINTING)  # before an older upload is waited for, which is no stall
        self._checkpointing.complete(self.step)
        self.ranks.meet()

    def _asks_for_checkpoint(self) -> bool:
        """Whether this process asks for a checkpoint: rank 0's clock, or the operator through rank 0."""
        checkpointing = self._checkpointing
        return self.ranks.rank == 0 and (
            checkpointing.overdue() or self._wishes.checkpoint_since(checkpointing.saved_step)
        )

    def _settle(self) -> StepReport | None:
        """Wait for the newest step and take over its values, once. Returns them; None before the first step."""
        if self._pending is not None:
            self._settled, self._pending = self._pending.read(), None
            self._journal.record(self._settled)
            self._divergence.watch(self._settled)
        return self._settled

    def _snapshot(self) -> Snapshot:
        self._settle()  # the log of a checkpoint ends with its own step
        self._publish(Activity.CHECKPOINTING)
        samples = self.step * self.training.recipe.global_batch
        return Snapshot(
            step=self.step,
            samples=samples,
            tensors=self._state.tensors(),
            teacher=self._state.teacher.backbone.state_dict(),
            card=model_card(self.training, self._manifest, samples),
            files=self._journal.files(self.step),
        )

    def _committed(self, ref: CheckpointRef, saved: SaveResult) -> None:
        self._journal.committed(ref, saved.stall_seconds, saved.stall_seconds + saved.upload_seconds)
        self._wishes.saved(ref.step)

    def _publish(self, activity: Activity) -> None:
        self._journal.publish(activity, self.step, checkpoints_skipped=self._writer.skipped)


if __name__ == "__main__":
    sys.exit(main())
