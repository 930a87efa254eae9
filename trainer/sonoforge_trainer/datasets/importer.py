"""What a data set's module provides: who it is, what is checked, and how its files become records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sonoforge_trainer.datasets.findings import Check, Findings
from sonoforge_trainer.datasets.record import Record
from sonoforge_trainer.datasets.splits import SplitRule
from sonoforge_trainer.shards.faults import SourceError


@dataclass(frozen=True)
class About:
    """What the data card says of a set, whatever copy of it is imported."""

    name: str
    """Name on the command line."""
    title: str
    """What it is."""
    source: str
    """Where its users get it: a DOI or an address."""
    licence: str
    """Licence of the images; `unknown` where its publisher states none that we know."""
    citation: str
    """How to cite it."""
    mask_classes: tuple[str, ...] = ()
    """Names of mask values 0 (the background), 1, 2 ...; empty where it has no masks."""


@dataclass(frozen=True)
class Source:
    """What an importer reads from."""

    root: Path
    """The folder that the user gave."""
    scratch: Path
    """A folder that lives as long as the import; for frames that are taken out of volumes."""
    findings: Findings
    """Where it counts what it finds."""
    workers: int = 1
    """Threads that may be used."""


@dataclass(frozen=True)
class Importer:
    """One data set."""

    about: About
    """Who it is."""
    read: Callable[[Source], list[Record]]
    """Find and describe every sample; pixels are read later. Raises SourceError."""
    split: SplitRule
    """How samples are split where the user names no lists."""
    checks: tuple[Check, ...] = ()
    """What `read` and the records' masks look for, beside what every set is checked for."""
    look: Callable[[Record, NDArray[np.uint8]], tuple[str, ...]] | None = None
    """A further look at an image's pixels, [height, width] or [height, width, 3]: codes of checks that it trips."""


def find(root: Path, name: str, kind: Literal["file", "folder"] = "folder") -> Path:
    """The one file or folder called `name` at or below `root`: archives are unpacked with and without outer folders.

    Where several fit, the one nearest to `root` is taken. Raises SourceError where there is none, or two equally near.
    """
    if not root.is_dir():
        raise SourceError("PATH: there is no such folder; give the folder that the unpacked download is in")
    if kind == "folder" and root.name == name:
        return root
    fits = [p for p in root.rglob(name) if (p.is_file() if kind == "file" else p.is_dir())]
    if not fits:
        raise SourceError(f"PATH: found no {kind} {name} at or below it; give the folder of the unpacked download")
    nearest = min(len(path.parts) for path in fits)
    near = [path for path in fits if len(path.parts) == nearest]
    if len(near) > 1:
        raise SourceError(f"PATH: found {len(near)} {kind}s {name} below it; give the folder of one copy")
    return near[0]


def files(folder: Path, suffix: str) -> list[Path]:
    """Files of a folder with this ending, in the order of their names, without hidden ones such as ._NAME of macOS."""
    return sorted(path for path in folder.glob(f"*{suffix}") if not path.name.startswith("."))
