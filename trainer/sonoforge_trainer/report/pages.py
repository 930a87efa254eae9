"""Pages that are made once: the page of a run is kept under the digest of what it was made from."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sonoforge_trainer.contract import canonical_json
from sonoforge_trainer.report.catalogue import Listed, list_runs
from sonoforge_trainer.report.index import render_index
from sonoforge_trainer.report.page import render
from sonoforge_trainer.report.runs import survey
from sonoforge_trainer.storage import Storage

CACHE_BYTES = 256 * 2**20
"""Bytes of pages that are kept; the least recently asked for go first."""


MAX_RUNS = 12
"""Runs of one page."""


@dataclass(frozen=True)
class Page:
    """One answer."""

    digest: str
    """Of what it was made from."""
    body: bytes
    """HTML."""


class Pages:
    """The index and the page of every run below one URI. Safe to use from several threads."""

    def __init__(self, runs_uri: str, storage: Storage, *, images: bool = True) -> None:
        self.runs_uri = runs_uri.rstrip("/")
        self._storage, self._images = storage, images
        self._kept: OrderedDict[str, Page] = OrderedDict()
        self._lock = threading.Lock()
        self._making: dict[str, threading.Lock] = {}

    def index(self) -> Page:
        """The list of runs, as storage has them now. Raises StorageError."""
        return self._index(list_runs(self.runs_uri, self._storage))

    def runs(self, paths: Sequence[str]) -> Page | None:
        """One page of the runs with these paths, or None where there is none or the listing lacks one of them.

        A path is looked up and never joined to a URI, so it cannot lead anywhere else. Raises StorageError, and
        ContractError where the checkpoints that were listed are gone.
        """
        listed = {run.path: run for run in list_runs(self.runs_uri, self._storage)}
        wanted = list(dict.fromkeys(paths))
        if not 0 < len(wanted) <= MAX_RUNS or not listed.keys() >= set(wanted):
            return None
        found = [listed[path] for path in wanted]
        made_from = canonical_json([[run.path, run.digest] for run in found])
        return self._made(f"sha256:{hashlib.sha256(made_from.encode()).hexdigest()}", lambda: self._page(found))

    def _index(self, runs: Sequence[Listed]) -> Page:
        body = render_index(self.runs_uri, runs).encode()
        return Page(f"sha256:{hashlib.sha256(body).hexdigest()}", body)

    def _page(self, runs: Sequence[Listed]) -> bytes:
        summaries = [survey(run.uri, self._storage) for run in runs]
        return render(summaries, self._storage, images=self._images).encode()

    def _made(self, digest: str, make: Callable[[], bytes]) -> Page:
        """The kept page, or a new one; two visitors who ask at once wait for the same one."""
        with self._lock:
            turn = self._making.setdefault(digest, threading.Lock())
        with turn:
            with self._lock:
                if digest in self._kept:
                    self._kept.move_to_end(digest)
                    return self._kept[digest]
            try:
                page = Page(digest, make())
            finally:
                with self._lock:
                    self._making.pop(digest, None)
            with self._lock:
                self._kept[digest] = page
                while len(self._kept) > 1 and sum(len(p.body) for p in self._kept.values()) > CACHE_BYTES:
                    self._kept.popitem(last=False)
            return page
