"""The runs below one URI, found by listing, with a digest of everything that the page of each is made from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote

from sonoforge_trainer.checkpoint.store import PRUNED
from sonoforge_trainer.contract import COMMIT, canonical_json, parse_prefix
from sonoforge_trainer.report.runs import BASELINES, SUMMARY
from sonoforge_trainer.storage import ObjectInfo, Storage

_MARKER = "/step-"


@dataclass(frozen=True)
class Listed:
    """One run that was found."""

    path: str
    """Below the URI of the runs; empty where that URI is the run itself."""
    uri: str
    """URI of its checkpoints."""
    checkpoints: int
    """Committed or pruned checkpoints."""
    newest_step: int
    """Steps of the newest of them."""
    results: int
    """Complete results."""
    digest: str
    """Changes when anything that the page is made from does: `sha256:<hex>` over names, sizes and etags."""

    @property
    def link(self) -> str:
        """Path of its page."""
        return f"/run/{quote(self.path, safe='')}"


def list_runs(runs_uri: str, storage: Storage) -> list[Listed]:
    """Every run with a committed checkpoint below a URI, by path. One LIST; raises StorageError."""
    base = runs_uri.rstrip("/")
    objects: dict[str, list[tuple[str, ObjectInfo]]] = {}
    beside: dict[str, list[ObjectInfo]] = {}
    for info in storage.list(f"{base}/"):
        below = info.uri.removeprefix(base)
        run, marker, rest = below.partition(_MARKER)
        if marker and parse_prefix(marker + rest):
            objects.setdefault(run, []).append((marker + rest, info))
        elif below.endswith(f"/{SUMMARY}") or f"/{BASELINES}/" in below:
            beside.setdefault(below.partition(f"/{BASELINES}/")[0].removesuffix(f"/{SUMMARY}"), []).append(info)
    found = [_listed(base, run, named, beside.get(run, [])) for run, named in sorted(objects.items())]
    return [run for run in found if run.checkpoints]


def _listed(base: str, run: str, named: Iterable[tuple[str, ObjectInfo]], beside: Iterable[ObjectInfo]) -> Listed:
    made_from = [(info.uri.removeprefix(base), info.size, info.etag) for info in beside]
    steps: dict[str, int] = {}
    results = 0
    for name, info in named:
        _, step, attempt, *below = name.split("/", 3)
        rest = "".join(below)
        made_from.append((name, info.size, info.etag))  # states too: a checkpoint that lacks one is not shown
        if rest in (COMMIT, PRUNED):
            steps[f"{step}/{attempt}"] = int(step.removeprefix("step-"))
        results += rest.startswith("eval/") and rest.count("/") == 1 and rest.endswith(".json")
    digest = hashlib.sha256(canonical_json(sorted(made_from)).encode()).hexdigest()
    return Listed(
        path=run.strip("/"),
        uri=base + run,
        checkpoints=len(steps),
        newest_step=max(steps.values(), default=0),
        results=results,
        digest=f"sha256:{digest}",
    )
