"""A worker process: joins the others, continues from the newest checkpoint, trains, and leaves when it is told to.

What every process must agree on (to stop, to save) travels in the step's one reduction and is read one step later, so
that all of them act on it after the same step and the device never waits for the host.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import structlog
import torch

from sonoforge_trainer import termination
from sonoforge_trainer.card import model_card
from sonoforge_trainer.checkpoint import (
    CheckpointStore,
    CheckpointWriter,
    LoadedCheckpoint,
    Peers,
    RunIdentity,
    SaveResult,
    Snapshot,
    fresh_attempt,
    restore,
)
from sonoforge_trainer.contract import (
    ENV_CONFIG,
    ENV_STORE,
    Activity,
    CheckpointRef,
    ContractError,
    ExitCode,
    Progress,
    RunConfig,
    ShardManifest,
    load_yaml,
)
from sonoforge_trainer.coordinator_client import ProgressPublisher
from sonoforge_trainer.flops import training_flops
from sonoforge_trainer.metrics import CommittedLog, Gpu, Means, StepClock, TensorBoard, peak_flops
from sonoforge_trainer.ranks import Ranks
from sonoforge_trainer.redact import KeyHasher
from sonoforge_trainer.state import TrainState
from sonoforge_trainer.step import Step, StepOutput, StepReport
from sonoforge_trainer.storage import Storage
from sonoforge_trainer.stream import MicroBatch, Stream

_NOT_FINITE_STEPS = 50
_COMMIT_SECONDS = 3600.0
_FAILED_SAVES = 3
METRICS, SAMPLES = "metrics.jsonl", "samples"

log = structlog.get_logger(__name__)


class DivergedError(FloatingPointError):
    """No finite gradient for many steps in a row."""


@dataclass
class Told:
    """Whether this process was told to stop."""

    stop: bool = False

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Remember; the next step tells the others."""
        self.stop = True


def main() -> int:
    """Run one worker process, configured by the environment. Returns an ExitCode.

    `worker.py` has set up its logs and tied its life to the agent's.
    """
    told = Told()
    signal.signal(signal.SIGTERM, told.on_signal)
    signal.signal(signal.SIGINT, told.on_signal)
    run: Run | None = None
    ranks: Ranks | None = None
    try:
        config = read_config(os.environ)
        ranks = Ranks.from_env(config.execution)
        with Run(config, ranks, told) as run:
            return run.train()
    except (KeyboardInterrupt, Exception) as error:  # noqa: BLE001 - the last frame: every ending gets its class
        rank, step = (ranks.rank if ranks else None), (run.step if run else None)
        ending = termination.classify(error, rank=rank, step=step)
        log.error("worker-failed", **ending.model_dump(exclude={"result"}, exclude_none=True))  # noqa: TRY400 - a stack may hold paths
        return termination.report(error, rank=rank, step=step)
    finally:
        if ranks is not None:
            ranks.close()


def read_config(environ: os._Environ[str]) -> RunConfig:
    """The RunConfig named by the environment. Raises ContractError."""
    path = environ.get(ENV_CONFIG)
    if not path:
        raise ContractError(f"{ENV_CONFIG}: not set; give it the path of the run's configuration file")
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ContractError(f"{ENV_CONFIG}: the file cannot be read ({error.strerror})") from None
    return RunConfig.parse(load_yaml(text, where="configuration"), where="configuration")


@dataclass
class _Account:
    """What rank 0 knows of the run beside its state, for progress."""

    checkpoints: list[CheckpointRef] = field(default_factory=list)
    quarantined: tuple[str, ...] = ()
    restored_step: int | None = None
    losses: dict[str, float] = field(default_factory=dict)
    finite: bool = True
    skipped_steps: int = 0
    corrupt_samples: int = 0
    stall_seconds: float = 0.0
    step_time: float = 0.0


class Run:
    """One process of one process group, from joining to leaving."""

    def __init__(self, config: RunConfig, ranks: Ranks, told: Told) -> None:
        """Load the data set's manifest and the newest checkpoint. All processes call it together."""
        self.config, self.training, self.ranks, self.told = config, config.training, ranks, told
        self._exits = ExitStack()
        self.storage = Storage.from_env()
        self.manifest = read_manifest(config, self.storage)
        self.attempt = ranks.agree("attempt", fresh_attempt())
        self.step = 0
        self._account = _Account()
        self._clock, self._means = StepClock(), Means()
        self._metrics, self._samples = CommittedLog(), CommittedLog()
        self._gpu, self._peak = Gpu(ranks.device), peak_flops(ranks.device)
        self._publisher = self._make_publisher()
        self._publish(Activity.STARTING)
        self.state = TrainState(self.training, ranks.device)
        identity = RunIdentity.of(config, self.manifest.dataset_digest)
        peers = Peers(ranks.rank, ranks.world_size, ranks.store, ranks.control)
        checkpoints = CheckpointStore(self.storage, config.checkpoints.uri, identity)
        restored = self._restore(checkpoints, peers)
        self.writer = CheckpointWriter(
            self.storage,
            config.checkpoints.uri,
            identity,
            self.attempt,
            peers,
            previous=restored.ref.manifest_digest if restored else None,
            device=ranks.device,
        )
        self._exits.callback(self.writer.close)
        self._stream = self._open_stream()
        self._saved_time, self._saved_step = time.monotonic(), -1
        self._failed_saves = 0
        self._unfinite_steps = 0
        self._pending: StepOutput | None = None
        self._recorded = -1

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def train(self) -> ExitCode:
        """Train to the end of the budget, or until any process is told to stop. Returns OK or TERMINATED."""
        steps = self.training.recipe.steps
        if self.step == 0 and not self._account.checkpoints:
            self._save()  # the random initialisation: what every later checkpoint is compared with
        step = Step(self.training, self.state, self.ranks, self.config.execution)
        batches = self._stream.batches(self.step, self.ranks.virtual_ranks(self.training.recipe.virtual_ranks))
        while self.step < steps:
            self._clock.begin()
            batch = next(batches)
            self._clock.ready()
            output = step(
                batch,
                self.step,
                stop=self.told.stop,
                checkpoint=self._wants_checkpoint(),
                busy=self.writer.busy(),
            )
            self.step += 1
            self._keep_samples(batch)
            agreed = self._pending.read() if self._pending else None
            self._pending = output
            self._clock.end()
            if agreed:
                self._record(agreed)
                if agreed.stop:
                    return self._leave()
            self._follow_schedule(agreed)
            self._publish(Activity.TRAINING)
        self._save_and_wait()
        self._publish(Activity.FINISHED)
        log.info("finished", step=self.step)
        return ExitCode.OK

    def _leave(self) -> ExitCode:
        """Save where everybody stands, then go."""
        self._save_and_wait()
        self._publish(Activity.STOPPED)
        log.info("stopped", step=self.step)
        return ExitCode.TERMINATED

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _restore(self, checkpoints: CheckpointStore, peers: Peers) -> LoadedCheckpoint | None:
        loaded = restore(checkpoints, peers, self.attempt)
        if loaded:
            self.state.load_tensors(loaded.tensors)
            self.step = loaded.ref.step
            self._account.restored_step = loaded.ref.step
            log.info("restored", id=loaded.ref.id, step=self.step, world_size=self.ranks.world_size)
        if self.ranks.rank == 0:
            self._account.checkpoints = checkpoints.committed()
            self._account.quarantined = tuple(checkpoints.quarantined())
        elif loaded:
            self._account.checkpoints = [loaded.ref]
        return loaded

    def _wants_checkpoint(self) -> bool:
        """Whether this process asks for one: rank 0's clock, or the operator."""
        if self.ranks.rank != 0:
            return False
        asked = False
        for request in self._publisher.requests() if self._publisher else ():
            if request.kind == "stop":
                self.told.stop = True
            asked = asked or request.kind == "checkpoint"
            if self._publisher and request.kind != "lost":
                self._publisher.acknowledge(request)
        seconds = self.config.checkpoints.interval_seconds
        return asked or (seconds is not None and time.monotonic() - self._saved_time >= seconds)

    def _follow_schedule(self, agreed: StepReport | None) -> None:
        """Save where the samples say so, or where the processes agreed to; leave it out while one still uploads."""
        self._collect(self.writer.poll())
        every, batch = self.config.checkpoints.every_samples, self.training.recipe.global_batch
        due = every is not None and self.step * batch // every > (self.step - 1) * batch // every
        if not (due or (agreed and agreed.checkpoint)) or self.step == self.training.recipe.steps:
            return
        if agreed is None or agreed.step < self._saved_step:
            self._save_and_wait()  # nobody has heard yet whether the others still upload the newest one
        elif agreed.busy:
            self.writer.skip(self.step)
        else:
            self._save()

    def _save(self) -> None:
        if self._pending:
            self._record(self._pending.read())  # the log of a checkpoint ends with its own step
        self._publish(Activity.CHECKPOINTING)
        self._saved_time, self._saved_step = time.monotonic(), self.step
        samples = self.step * self.training.recipe.global_batch
        rank, world_size = self.ranks.rank, self.ranks.world_size
        files: dict[str, bytes] = {}
        if rank == 0:
            files[METRICS] = self._metrics.text(self.step)
        if self.config.execution.record_samples:
            files[f"{SAMPLES}-{rank:05d}-of-{world_size:05d}.jsonl"] = self._samples.text(self.step)
        self.writer.save(
            Snapshot(
                step=self.step,
                samples=samples,
                tensors=self.state.tensors(),
                teacher=self.state.teacher.backbone.state_dict(),
                card=model_card(self.training, self.manifest, samples),
                files=files,
            )
        )

    def _save_and_wait(self) -> None:
        self._collect(self.writer.wait(_COMMIT_SECONDS))
        if any(c.step == self.step for c in self._account.checkpoints):
            return
        self._save()
        result = self.writer.wait(_COMMIT_SECONDS)
        self._collect(result)
        if result and result.error:
            raise result.error

    def _collect(self, result: SaveResult | None) -> None:
        if result is None:
            return
        if result.ref is None:
            self._failed_saves += 1
            if self._failed_saves >= _FAILED_SAVES and result.error:
                raise result.error
            return
        self._failed_saves = 0
        self._account.checkpoints = [*self._account.checkpoints, result.ref]
        self._account.stall_seconds = result.stall_seconds
        self._metrics.forget(result.ref.step)
        self._samples.forget(result.ref.step)
        log.info("checkpoint", id=result.ref.id, stall=result.stall_seconds, upload=result.upload_seconds)

    # --- data ---------------------------------------------------------------------------------------------------------

    def _open_stream(self) -> Stream:
        base_uri = self.training.data.shards.rpartition("/")[0]
        hasher = KeyHasher.from_env()
        return self._exits.enter_context(
            Stream(self.manifest, base_uri, self.training, self.config.execution, self.storage, hasher)
        )

    def _keep_samples(self, batch: list[MicroBatch]) -> None:
        if self.config.execution.record_samples:
            for record in self._stream.sample_log_lines(batch):
                self._samples.add(self.step, record)

    # --- telling ------------------------------------------------------------------------------------------------------

    def _record(self, report: StepReport) -> None:
        """Take over the values of an ended step, once, and write a record when an interval is over."""
        if report.step <= self._recorded:
            return
        self._recorded = report.step
        account = self._account
        account.losses, account.finite = report.losses, report.finite
        account.skipped_steps = report.skipped
        account.corrupt_samples += report.corrupt
        account.step_time = time.time()
        self._unfinite_steps = 0 if report.finite else self._unfinite_steps + 1
        if self._unfinite_steps >= _NOT_FINITE_STEPS:
            raise DivergedError(f"no finite gradient in {_NOT_FINITE_STEPS} steps in a row, the last is {report.step}")
        if self.ranks.rank != 0:
            return
        values = {("loss" if name == "total" else f"loss_{name}"): v for name, v in report.losses.items()}
        values["teacher_entropy"] = values.pop("loss_teacher_entropy")
        values |= {f"grad_norm_{name}": value for name, value in report.gradient_norms.items()}
        self._means.add(values)
        done = report.step + 1
        if done % self.config.execution.log_every_steps and done != self.training.recipe.steps:
            return
        record = {"step": done, "samples": done * self.training.recipe.global_batch} | self._means.take()
        record |= self._measures(report)
        self._metrics.add(done, record)
        self._board.add(done, record)
        log.info("metrics", **record)

    def _measures(self, report: StepReport) -> dict[str, Any]:
        rate = self._clock.samples_per_second(self.training.recipe.global_batch)
        schedule = report.schedule
        found: dict[str, Any] = {
            "lr": schedule.lr,
            "weight_decay": schedule.weight_decay,
            "teacher_momentum": schedule.teacher_momentum,
            "teacher_temperature": schedule.teacher_temperature,
            "samples_per_second": rate,
            "data_wait": self._clock.data_wait,
            "world_size": self.ranks.world_size,
            "skipped_steps": report.skipped,
            **self._gpu.read(),
        }
        if self._peak:
            found["mfu"] = rate * training_flops(self.training) / (self._peak * self.ranks.world_size)
            found["memory_bytes"] = torch.cuda.max_memory_allocated(self.ranks.device)
        return found

    def _make_publisher(self) -> ProgressPublisher | None:
        endpoint = os.environ.get(ENV_STORE)
        folder = self.config.execution.tensorboard_dir
        self._board = TensorBoard(Path(folder) if folder and self.ranks.rank == 0 else None)
        self._exits.callback(self._board.close)
        if self.ranks.rank != 0 or not endpoint:
            return None
        return self._exits.enter_context(ProgressPublisher(endpoint))

    def _publish(self, activity: Activity) -> None:
        if self._publisher is None:
            return
        account, recipe = self._account, self.training.recipe
        losses = {name: value for name, value in account.losses.items() if value == value}
        entropy = losses.pop("teacher_entropy", None)
        self._publisher.publish(
            Progress(
                attempt=self.attempt,
                activity=activity,
                updated=time.time(),
                step=self.step,
                steps=recipe.steps,
                step_time=account.step_time,
                samples=self.step * recipe.global_batch,
                budget_samples=recipe.budget_samples,
                world_size=self.ranks.world_size,
                nodes=int(os.environ.get("GROUP_WORLD_SIZE", "1")),
                virtual_ranks=recipe.virtual_ranks,
                samples_per_second=self._clock.samples_per_second(recipe.global_batch),
                data_wait=self._clock.data_wait,
                loss=losses.pop("total", None),
                losses=losses,
                loss_finite=account.finite,
                skipped_steps=account.skipped_steps,
                teacher_entropy=entropy,
                corrupt_samples=account.corrupt_samples,
                median_step_seconds=self._clock.median_seconds,
                restored_step=account.restored_step,
                data_digest=self.manifest.dataset_digest,
                config_digest=self.training.digest(),
                checkpoints=tuple(account.checkpoints),
                checkpoint_stall_seconds=account.stall_seconds,
                checkpoints_skipped=self.writer.skipped if hasattr(self, "writer") else 0,
                quarantined=account.quarantined,
            )
        )


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


if __name__ == "__main__":
    sys.exit(main())
