"""Which checkpoints may be deleted: a pure function of the checkpoints, their scores and the configuration."""

from __future__ import annotations

from collections.abc import Sequence

from sonoforge_operator.status import CheckpointStatus
from sonoforge_trainer.contract import CheckpointConfig


def prunable(
    checkpoints: Sequence[CheckpointStatus], config: CheckpointConfig, best_by: str | None, *, highest: bool
) -> tuple[str, ...]:
    """Ids of the checkpoints that retention deletes, oldest first.

    Kept are the newest `keep_last`, the first at or after each multiple of `keep_every_samples`, the `keep_best` with
    the best validation scores, and every checkpoint that still waits for a score.
    """
    alive = [c for c in checkpoints if not c.pruned]
    keep = {c.ref.id for c in alive if not c.evaluated}
    keep |= {c.ref.id for c in alive[-config.keep_last :]}
    if config.keep_every_samples:
        # Marks are counted over all checkpoints, so that deleting one never promotes its neighbour.
        marks: set[int] = set()
        for checkpoint in checkpoints:
            mark = checkpoint.ref.samples // config.keep_every_samples
            if mark and mark not in marks:
                keep.add(checkpoint.ref.id)
            marks.add(mark)
    if best_by and config.keep_best:
        scored = [(score, c.ref.id) for c in alive if (score := c.compared(best_by)) is not None]
        scored.sort(key=lambda pair: pair[0], reverse=highest)
        keep |= {id_ for _, id_ in scored[: config.keep_best]}
    return tuple(c.ref.id for c in alive if c.ref.id not in keep)
