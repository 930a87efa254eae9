"""Writes a planned data set as shards, so that a killed build goes on and ends with the same bytes.

An unfinished data set holds `.build/plan.json` and, for each finished shard, `.build/NAME.json` with its digest. Each
is bound to what it was made from by a keyed fingerprint: an option, a file's size or its time that changes makes the
shard anew. `shards.json` is written last; a data set that has it is never changed again.

Members of a sample: KEY.jpg or KEY.png, KEY.mask.png where there is a mask, KEY.json. KEY is the eight-digit ordinal in
the data set and the first eight hex digits of the SHA-256 of the image member.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from typing import Any, Literal

import PIL

from sonoforge_trainer.contract import Shard, ShardManifest, dataset_digest
from sonoforge_trainer.contract.base import canonical_json
from sonoforge_trainer.redact import KeyHasher
from sonoforge_trainer.shards.faults import DataSetError, ImageError, SourceError
from sonoforge_trainer.shards.plan import Placed
from sonoforge_trainer.shards.sources import Row
from sonoforge_trainer.shards.tars import TarWriter
from sonoforge_trainer.storage import ObjectNotFoundError, Storage

MANIFEST = "shards.json"
"""Name of the manifest, beside the shards."""
_JOURNAL = ".build/"
_PLAN = _JOURNAL + "plan.json"
_LAYOUT = "sonoforge.build/v1"
_REJECTED_LIMIT = 100
_SHARD_NAME = re.compile(r"[A-Za-z0-9._-]+-[0-9]{5,}\.tar")


@dataclass(frozen=True)
class Rendered:
    """The members of one sample."""

    image: bytes
    """JPEG or PNG, 8-bit gray or RGB."""
    extension: Literal["jpg", "png"]
    """Its format."""
    mask: bytes | None = None
    """PNG of class indices, where there is one."""


Render = Callable[[Row], Rendered]
"""Makes a sample's members, in any thread. Raises ImageError for a sample that cannot be used."""


@dataclass(frozen=True)
class DataSetCard:
    """What the manifest says of the data set."""

    name: str
    """What people call it; shard names begin with it."""
    synthetic: bool = False
    """Whether images were generated and not measured."""
    licence: str = ""
    """Licence of the images."""
    citation: str = ""
    """How to cite them."""
    mask_classes: tuple[str, ...] = ()
    """Names of the mask values 0, 1, 2 ..."""


@dataclass(frozen=True)
class Rejected:
    """A sample that cannot be used."""

    number: int
    """Number of the row, file or sample in the source."""
    hash: str
    """Keyed hash of its path or key."""
    reason: str
    """Why, without names or paths."""


@dataclass(frozen=True)
class BuildRule:
    """How to build."""

    options: str = ""
    """Everything that decides what `render` makes, as text."""
    on_error: Literal["refuse", "skip"] = "refuse"
    """refuse: look at everything (until 100 are rejected), then fail without a manifest."""
    workers: int = 1
    """Shards that are made at the same time, in threads."""


@dataclass(frozen=True)
class BuildResult:
    """A finished build."""

    manifest: ShardManifest
    """What was written, or found finished."""
    rejected: tuple[Rejected, ...]
    """Samples that were left out."""
    made: int
    """Shards written by this call."""
    reused: int
    """Shards found finished."""
    completed: bool = True
    """Whether this call completed the data set; it may have made no shard, and left out what an earlier one refused."""


class RejectedError(DataSetError):
    """Samples were rejected and the rule is to refuse. No manifest was written."""

    def __init__(self, rejected: Sequence[Rejected], complete: bool) -> None:
        self.rejected = tuple(rejected)
        more = "" if complete else " (stopped looking there)"
        super().__init__(
            f"{len(self.rejected)} samples cannot be used{more}, so no data set was written; repair or remove them, "
            f"or leave them out with --on-error skip. Finished shards are kept for the next try"
        )


def build(
    plan: Sequence[Sequence[Placed]],
    card: DataSetCard,
    render: Render,
    output: str,
    storage: Storage,
    hasher: KeyHasher,
    rule: BuildRule,
    progress: Callable[[Shard, bool], None] = lambda _shard, _reused: None,
) -> BuildResult:
    """Write the shards and the manifest of `plan` below the URI `output`.

    `progress` is called with each shard and whether it was reused, in any order, in this thread. Raises SourceError
    where `output` holds anything else, RejectedError by the rule, StorageError.
    """
    builder = _Builder(card, render, output, storage, hasher, rule)
    fingerprints = [builder.fingerprint([_identity(placed) for placed in samples]) for samples in plan]
    whole = builder.fingerprint([asdict(card), *fingerprints])
    finished = builder.open_output(whole)
    if finished is not None:
        builder.clear({shard.name for shard in finished.shards})
        return BuildResult(finished, (), 0, len(finished.shards), completed=False)
    outcomes: dict[int, _Outcome] = {}
    rejected = 0
    for outcome in builder.run(plan, fingerprints):
        outcomes[outcome.index] = outcome
        rejected += len(outcome.rejected)
        if outcome.shard is not None:
            progress(outcome.shard, outcome.reused)
        if rule.on_error == "refuse" and rejected >= _REJECTED_LIMIT:
            break
    ordered = [outcomes[index] for index in sorted(outcomes)]
    faults = sorted((fault for outcome in ordered for fault in outcome.rejected), key=lambda fault: fault.number)
    if faults and rule.on_error == "refuse":
        raise RejectedError(faults, complete=len(outcomes) == len(plan))
    shards = tuple(outcome.shard for outcome in ordered if outcome.shard is not None)
    if not shards:
        raise RejectedError(faults, complete=True)
    manifest = ShardManifest(
        **asdict(card),
        classes=tuple(sorted({placed.row.label for samples in plan for placed in samples} - {""})),
        samples=sum(shard.samples for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        dataset_digest=dataset_digest(shards),
        shards=shards,
    )
    builder.check_claim()
    builder.write(MANIFEST, manifest.to_json().encode() + b"\n")
    builder.clear({shard.name for shard in shards})
    reused = sum(outcome.reused for outcome in ordered)
    return BuildResult(manifest, tuple(faults), len(shards) - reused, reused)


@dataclass(frozen=True)
class _Outcome:
    index: int
    shard: Shard | None
    """None where every sample was rejected."""
    rejected: tuple[Rejected, ...]
    reused: bool


class _Builder:
    def __init__(
        self, card: DataSetCard, render: Render, output: str, storage: Storage, hasher: KeyHasher, rule: BuildRule
    ) -> None:
        self._card, self._render, self._storage, self._hasher, self._rule = card, render, storage, hasher, rule
        self._base = output.rstrip("/") + "/"
        self._claim = ""
        self._stop = threading.Event()

    def fingerprint(self, parts: object) -> str:
        """Keyed, because paths and patients go into it."""
        text = canonical_json([_LAYOUT, PIL.__version__, self._card.name, self._rule.options, parts])
        # Names of files that are not UTF-8 come with surrogates in them.
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        return self._hasher.hash(f"1{digest}") + self._hasher.hash(f"2{digest}")  # 24 hex digits

    def write(self, name: str, data: bytes | memoryview) -> None:
        self._storage.write(self._base + name, data)

    def open_output(self, whole: str) -> ShardManifest | None:
        """Claim the output; the manifest where this very build is finished already."""
        self._claim = whole
        names = {info.uri.removeprefix(self._base) for info in self._storage.list(self._base)}
        plan = self._document(_PLAN)
        if MANIFEST in names:
            if plan.get("fingerprint") != whole:
                raise SourceError(
                    f"{self._base} holds a finished data set from other images, options or another hash key; "
                    f"data sets are not changed: choose another output, or delete this one"
                )
            return ShardManifest.from_json(
                self._storage.read(self._base + MANIFEST), where=self._base + MANIFEST, show_values=False
            )
        if names and not plan:
            raise SourceError(f"{self._base} is not empty and holds no unfinished build; choose an empty place")
        if plan.get("fingerprint") != whole:
            self._write_document(_PLAN, {"format": _LAYOUT, "fingerprint": whole})
        return None

    def run(self, plan: Sequence[Sequence[Placed]], fingerprints: Sequence[str]) -> Iterator[_Outcome]:
        """Outcomes as they come, with a bounded number of shards under way."""
        with ThreadPoolExecutor(self._rule.workers, thread_name_prefix="shard") as pool:
            pending: set[Future[_Outcome]] = set()
            try:
                for index, samples in enumerate(plan):
                    pending.add(pool.submit(self._shard, index, samples, fingerprints[index]))
                    if len(pending) > self._rule.workers:
                        done, pending = wait(pending, return_when=FIRST_COMPLETED)
                        yield from (future.result() for future in done)
                while pending:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            finally:
                self._stop.set()
                for future in pending:
                    future.cancel()

    def check_claim(self) -> None:
        """Stop where another build took the output over."""
        if self._document(_PLAN).get("fingerprint") != self._claim:
            raise SourceError(f"another build writes to {self._base}; stop it, and start this one again or elsewhere")

    def clear(self, names: set[str]) -> None:
        """Delete the journal, and shards that an unfinished build of another plan left; the manifest is there."""
        for info in list(self._storage.list(self._base)):
            name = info.uri.removeprefix(self._base)
            if (name.startswith(_JOURNAL) and name != _PLAN) or (_SHARD_NAME.fullmatch(name) and name not in names):
                self._storage.delete(info.uri)

    def _shard_name(self, index: int) -> str:
        return f"{self._card.name}-{index:05d}.tar"

    def _record_name(self, index: int) -> str:
        return f"{_JOURNAL}{self._shard_name(index)}.json"

    def _document(self, name: str) -> dict[str, Any]:
        try:
            document = json.loads(self._storage.read(self._base + name))
        except ObjectNotFoundError:
            return {}
        except ValueError:
            raise SourceError(
                f"{self._base}{name} is not a build journal; choose another output, or delete it"
            ) from None
        return document if isinstance(document, dict) else {}

    def _write_document(self, name: str, document: dict[str, Any]) -> None:
        self.write(name, canonical_json(document).encode() + b"\n")

    def _finished(self, index: int, fingerprint: str) -> _Outcome | None:
        record = self._document(self._record_name(index))
        if record.get("fingerprint") != fingerprint:
            return None
        shard = Shard.parse(record["shard"], show_values=False) if record["shard"] else None
        rejected = tuple(Rejected(**fault) for fault in record["rejected"])
        if shard is not None:
            try:
                if self._storage.stat(self._base + shard.name).size != shard.bytes:
                    return None
            except ObjectNotFoundError:
                return None
        return _Outcome(index, shard, rejected, reused=True)

    def _shard(self, index: int, samples: Sequence[Placed], fingerprint: str) -> _Outcome:
        finished = self._finished(index, fingerprint)
        # A record with rejected samples is of use where they are left out; else the file may have been repaired since.
        if finished is not None and (self._rule.on_error == "skip" or not finished.rejected):
            return finished
        self.check_claim()
        # A record must never speak for bytes of another build, also where this one is killed before it writes its own.
        self._storage.delete(self._base + self._record_name(index))
        outcome = self._make(index, samples)
        self._write_document(
            self._record_name(index),
            {
                "format": _LAYOUT,
                "fingerprint": fingerprint,
                "shard": outcome.shard.document() if outcome.shard else None,
                "rejected": [asdict(fault) for fault in outcome.rejected],
            },
        )
        return outcome

    def _make(self, index: int, samples: Sequence[Placed]) -> _Outcome:
        columns: dict[str, list[Any]] = {name: [] for name in ("keys", "offsets", "lengths", "clips", "patients")}
        rejected = []
        with tempfile.TemporaryFile() as file:
            tar = TarWriter(file)
            for placed in samples:
                if self._stop.is_set():
                    raise SourceError("the build was stopped")
                row = placed.row
                try:
                    rendered = self._render(row)
                except ImageError as error:
                    rejected.append(Rejected(row.number, self._hasher.hash(row.reference), str(error)))
                    continue
                key = f"{placed.position:08d}-{hashlib.sha256(rendered.image).hexdigest()[:8]}"
                patient = patient_hash(self._hasher, row.patient)
                image = tar.add(f"{key}.{rendered.extension}", rendered.image)
                if rendered.mask is not None:
                    tar.add(f"{key}.mask.png", rendered.mask)
                tar.add(f"{key}.json", _sample_json(placed, patient))
                values = (key, image.offset, image.length, placed.clip, patient)
                for column, value in zip(columns.values(), values, strict=True):
                    column.append(value)
            tar.close()
            if not columns["keys"]:
                return _Outcome(index, None, tuple(rejected), reused=False)
            file.flush()
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages, memoryview(pages) as data:
                shard = Shard(
                    name=self._shard_name(index),
                    bytes=len(data),
                    sha256=f"sha256:{hashlib.sha256(data).hexdigest()}",
                    **columns,
                )
                self.write(shard.name, data)
        return _Outcome(index, shard, tuple(rejected), reused=False)


def patient_hash(hasher: KeyHasher, patient: str) -> str:
    """How a patient is called in shards: 12 hex digits, or empty text where the patient is not known."""
    return hasher.hash(f"patient\0{patient}") if patient else ""


def _sample_json(placed: Placed, patient: str) -> bytes:
    """The JSON member: clip is a number, everything else a text."""
    row = placed.row
    return canonical_json(
        {**dict(row.fields), "label": row.label, "split": row.split, "clip": placed.clip, "patient": patient}
    ).encode()


def _identity(placed: Placed) -> list[object]:
    """Everything that decides a sample's bytes, except what the files hold."""
    row = placed.row
    locations = [[loc.where, loc.stamp, loc.offset, loc.length] if loc else None for loc in (row.image, row.mask)]
    return [placed.position, placed.clip, row.reference, row.label, row.split, row.patient, *row.fields, *locations]
