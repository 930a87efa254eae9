"""Names and labels of the objects of a job. Each follows from the job's name and uid alone, so that making one twice
is making it once, and no two jobs that were ever called the same share one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

MANAGER = "sonoforge"
"""Field manager of everything the operator applies."""
DOMAIN = "sonoforge.dev"
LABEL_MANAGED, LABEL_NAME = "app.kubernetes.io/managed-by", "app.kubernetes.io/name"
LABEL_JOB, LABEL_UID, LABEL_PART = f"{DOMAIN}/job", f"{DOMAIN}/job-uid", f"{DOMAIN}/part"
LABEL_CHILD, LABEL_ATTEMPT = f"{DOMAIN}/child", f"{DOMAIN}/attempt"
LABEL_QUEUE = "kueue.x-k8s.io/queue-name"
LABEL_INDEX = "batch.kubernetes.io/job-completion-index"
ANNOTATION_DIGEST, ANNOTATION_REQUEST = f"{DOMAIN}/digest", f"{DOMAIN}/request"
SELECTOR = f"{LABEL_MANAGED}={MANAGER}"
"""Label selector of every object that the operator made."""

_LONGEST = 63
_LONGEST_CHILD = 27
"""The longest name of a child that is made into the name of a Job, `retention-` with its digest and number."""


@dataclass(frozen=True)
class Key:
    """Which PretrainJob."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True)
class Names:
    """The names of the objects of one job."""

    key: Key
    uid: str

    @property
    def base(self) -> str:
        """What every name starts with: the job's name, shortened where it must be, and a digest of its uid."""
        digest = hashlib.sha256(self.uid.encode()).hexdigest()[:8]
        room = _LONGEST - _LONGEST_CHILD - 1 - len(digest) - 1
        name = self.key.name.replace(".", "-")
        name = name if name[:1].isalpha() else f"j{name}"  # a Service has to begin with a letter
        return f"{name[:room].rstrip('-')}-{digest}"

    @property
    def coordinator(self) -> str:
        """Deployment and Service of the coordinator."""
        return f"{self.base}-coordinator"

    @property
    def workers(self) -> str:
        """Headless Service of the workers."""
        return f"{self.base}-workers"

    def worker_job(self, attempt: int) -> str:
        """Indexed Job of the workers of an attempt."""
        return f"{self.base}-w{attempt:03d}"

    def child(self, name: str) -> str:
        """Job of any other child."""
        return f"{self.base}-{name}"

    def checkpoint(self, checkpoint_id: str) -> str:
        """Checkpoint object."""
        return f"{self.base}-{checkpoint_id}"

    def labels(self, part: str) -> dict[str, str]:
        """Labels of an object that is this part of the job."""
        return {
            LABEL_MANAGED: MANAGER,
            LABEL_NAME: f"{MANAGER}-{part}",
            LABEL_JOB: self.key.name,
            LABEL_UID: self.uid,
            LABEL_PART: part,
        }
