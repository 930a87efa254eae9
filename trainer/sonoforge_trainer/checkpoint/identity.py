"""Which run a checkpoint belongs to, and the names under which it writes."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import UTC, datetime

from sonoforge_trainer.checkpoint.errors import ForeignCheckpointError
from sonoforge_trainer.contract import CheckpointManifest, RunConfig


@dataclass(frozen=True)
class RunIdentity:
    """What every checkpoint of a run has in common. How the run is executed or retained is not part of it."""

    job: str
    """Name of the job."""
    uid: str
    """Identity of the job."""
    seed: int
    """Seed of the recipe."""
    virtual_ranks: int
    """Virtual ranks of the recipe."""
    config_digest: str
    """Digest of the TrainConfig."""
    data_digest: str
    """Digest of the data set."""
    image_digest: str = ""
    """Digest of the container image, or its name where that is not pinned; empty outside one."""

    @classmethod
    def of(cls, run: RunConfig, data_digest: str, image: str = "") -> RunIdentity:
        """The identity of a run on the data set with this digest, in the image with this name."""
        return cls(
            job=run.job,
            uid=run.uid,
            seed=run.training.recipe.seed,
            virtual_ranks=run.training.recipe.virtual_ranks,
            config_digest=run.training.digest(),
            data_digest=data_digest,
            image_digest=image.partition("@")[2] or image,
        )

    def require(self, manifest: CheckpointManifest, uri: str) -> None:
        """Check that a checkpoint belongs to this run. Raises ForeignCheckpointError, a ValueError."""
        compared = (
            ("job uid", manifest.uid, self.uid),
            ("config digest", manifest.config_digest, self.config_digest),
            ("data digest", manifest.data_digest, self.data_digest),
        )
        differences = [f"{name} {theirs} (this run: {ours})" for name, theirs, ours in compared if theirs != ours]
        if differences:
            raise ForeignCheckpointError(
                f"checkpoint {uri} was written by job {manifest.job!r} with {', '.join(differences)}; continue with "
                "the training configuration and data set of that job, or give this one a checkpoints.uri of its own"
            )


_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def fresh_attempt(now: datetime | None = None) -> str:
    """A new identity for a process group: 26 characters that sort by time (a ULID: 48 bits of ms, 80 random bits).

    A process group that re-forms is a new one. One rank draws it and tells the others.
    """
    milliseconds = int((now or datetime.now(UTC)).timestamp() * 1000)
    number = (milliseconds << 80) | secrets.randbits(80)
    return "".join(_CROCKFORD[(number >> shift) & 31] for shift in range(125, -1, -5))


def utc_text(moment: datetime) -> str:
    """ISO 8601 in UTC with milliseconds, so that the order of texts is the order of moments."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
