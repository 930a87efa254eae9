"""What a run says of itself: records for its log, its checkpoints and TensorBoard; progress for the coordinator."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
import torch

from sonoforge_trainer.contract import METRICS, Activity, CheckpointRef, Progress, RunConfig, ShardManifest
from sonoforge_trainer.coordinator_client import ProgressPublisher
from sonoforge_trainer.flops import training_flops
from sonoforge_trainer.metrics import CommittedLog, Gpu, Means, StepClock, TensorBoard, peak_flops
from sonoforge_trainer.ranks import Ranks
from sonoforge_trainer.step import StepReport

SAMPLES = "samples"

log = structlog.get_logger(__name__)


@dataclass
class _Facts:
    """What progress has beside where the run stands."""

    checkpoints: list[CheckpointRef] = field(default_factory=list)
    quarantined: tuple[str, ...] = ()
    restored_step: int | None = None
    means: dict[str, float] = field(default_factory=dict)
    finite: bool = True
    skipped_steps: int = 0
    corrupt_samples: int = 0
    stall_seconds: float = 0.0
    save_seconds: float = 0.0
    step_time: float = 0.0


class Journal:
    """The journal of one process. Rank 0 alone writes metrics and publishes progress; every rank logs its samples."""

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        attempt: str,
        manifest: ShardManifest,
        publisher: ProgressPublisher | None,
    ) -> None:
        self._config, self._ranks, self._attempt, self._manifest = config, ranks, attempt, manifest
        self._config_digest = config.training.digest()
        self._publisher = publisher
        self._facts = _Facts()
        self._means = Means()
        self._corrupt = 0
        self._metrics, self._samples = CommittedLog(), CommittedLog()
        self._gpu, self._peak = Gpu(ranks.device), peak_flops(ranks.device)
        self._board = TensorBoard(None)
        self.clock = StepClock()
        """Times of steps."""

    def begin(
        self, restored_step: int | None, checkpoints: Iterable[CheckpointRef], quarantined: Iterable[str]
    ) -> None:
        """Go on after what the run continues from, or from the start."""
        facts = self._facts
        facts.restored_step, facts.checkpoints, facts.quarantined = restored_step, [*checkpoints], (*quarantined,)
        folder = self._config.execution.tensorboard_dir
        if folder and self._ranks.rank == 0:
            self._board = TensorBoard(Path(folder), first_step=(restored_step or 0) + 1)

    def close(self) -> None:
        """Close the files."""
        self._board.close()

    @property
    def fault(self) -> str:
        """What the driver says is wrong with this process's GPU; empty where it says nothing."""
        return self._gpu.fault()

    # --- records ------------------------------------------------------------------------------------------------------

    def record(self, report: StepReport) -> None:
        """Take over the values of an ended step, and write a record where an interval is over.

        Means are over the steps that changed something: one value that is not finite would hide all others. Corrupt
        samples are those of the interval, so that records of all process groups add up, but for intervals that a
        restart cut off.
        """
        facts, recipe = self._facts, self._config.training.recipe
        facts.finite, facts.skipped_steps = report.finite, report.skipped
        facts.corrupt_samples += report.corrupt
        self._corrupt += report.corrupt
        facts.step_time = time.time()
        if self._ranks.rank != 0:
            return
        if report.finite:
            self._means.add(_values(report))
        done = report.step + 1
        if done % self._config.execution.log_every_steps and done != recipe.steps:
            return
        means = self._means.take()
        facts.means = means or facts.means
        counts = {"step": done, "samples": done * recipe.global_batch, "corrupt_samples": self._corrupt}
        self._corrupt = 0
        record = counts | means | self._measures(report)
        self._metrics.add(done, record)
        self._board.add(done, record)
        log.info("metrics", **record)

    def keep_samples(self, step: int, records: Iterable[Mapping[str, Any]]) -> None:
        """Keep the names of samples of the step that ends with `step` steps done."""
        for record in records:
            self._samples.add(step, record)

    def files(self, step: int) -> dict[str, bytes]:
        """This rank's logs of the steps that no committed checkpoint has, up to and with `step`."""
        rank, world_size = self._ranks.rank, self._ranks.world_size
        found = {METRICS: self._metrics.text(step)} if rank == 0 else {}
        if self._config.execution.record_samples:
            found[f"{SAMPLES}-{rank:05d}-of-{world_size:05d}.jsonl"] = self._samples.text(step)
        return found

    def committed(self, ref: CheckpointRef, stall_seconds: float, save_seconds: float) -> None:
        """A checkpoint is committed, and the logs in it are safe. It took so long, and held training up so long."""
        self._facts.checkpoints = [*self._facts.checkpoints, ref]
        self._facts.stall_seconds, self._facts.save_seconds = stall_seconds, save_seconds
        self._metrics.forget(ref.step)
        self._samples.forget(ref.step)

    def _measures(self, report: StepReport) -> dict[str, Any]:
        training, device = self._config.training, self._ranks.device
        rate = self.clock.samples_per_second(training.recipe.global_batch)
        found: dict[str, Any] = {
            "lr": report.schedule.lr,
            **({"backbone_lr": report.schedule.backbone_lr} if training.init else {}),
            "weight_decay": report.schedule.weight_decay,
            "teacher_momentum": report.schedule.teacher_momentum,
            "teacher_temperature": report.schedule.teacher_temperature,
            "samples_per_second": rate,
            "data_wait": self.clock.data_wait,
            "world_size": self._ranks.world_size,
            "skipped_steps": report.skipped,
            **self._gpu.read(),
        }
        if self._peak:
            found["mfu"] = rate * training_flops(training) / (self._peak * self._ranks.world_size)
        if device.type == "cuda":
            found["memory_bytes"] = torch.cuda.max_memory_allocated(device)
        return found

    # --- progress -----------------------------------------------------------------------------------------------------

    def publish(self, activity: Activity, step: int, *, checkpoints_skipped: int = 0) -> None:
        """Say what the run does, when `step` steps are done. Returns at once."""
        if self._publisher is None:
            return
        facts, clock, recipe = self._facts, self.clock, self._config.training.recipe
        parts = {name.removeprefix("loss_"): v for name, v in facts.means.items() if name.startswith("loss_")}
        self._publisher.publish(
            Progress(
                attempt=self._attempt,
                activity=activity,
                updated=time.time(),
                step=step,
                steps=recipe.steps,
                step_time=facts.step_time,
                samples=step * recipe.global_batch,
                budget_samples=recipe.budget_samples,
                world_size=self._ranks.world_size,
                nodes=int(os.environ.get("GROUP_WORLD_SIZE", "1")),
                virtual_ranks=recipe.virtual_ranks,
                samples_per_second=clock.samples_per_second(recipe.global_batch),
                data_wait=clock.data_wait,
                loss=facts.means.get("loss"),
                losses=parts,
                loss_finite=facts.finite,
                skipped_steps=facts.skipped_steps,
                teacher_entropy=facts.means.get("teacher_entropy"),
                corrupt_samples=facts.corrupt_samples,
                median_step_seconds=clock.median_seconds,
                restored_step=facts.restored_step,
                data_digest=self._manifest.dataset_digest,
                dataset_samples=self._manifest.samples,
                config_digest=self._config_digest,
                checkpoints=tuple(facts.checkpoints),
                checkpoint_seconds=facts.save_seconds,
                checkpoint_stall_seconds=facts.stall_seconds,
                checkpoints_skipped=checkpoints_skipped,
                quarantined=facts.quarantined,
            )
        )


def _values(report: StepReport) -> dict[str, float]:
    """The numbers of a step by the names that they have in a record."""
    parts = dict(report.losses)
    named = {"loss": parts.pop("total"), "teacher_entropy": parts.pop("teacher_entropy")}
    named |= {f"loss_{name}": value for name, value in parts.items()}
    return named | {f"grad_norm_{name}": value for name, value in report.gradient_norms.items()}
