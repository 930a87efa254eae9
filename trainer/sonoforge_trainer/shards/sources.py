"""Where samples come from: a folder, a CSV file, or an existing WebDataset. Nothing is decoded or unpickled here."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from sonoforge_trainer.shards.faults import ImageError, SourceError, TarError
from sonoforge_trainer.shards.images import SUFFIXES
from sonoforge_trainer.shards.tars import Member, members
from sonoforge_trainer.storage import Storage

SPLITS = ("train", "val", "test", "unlabelled")
"""Names of splits. Pretraining uses train and unlabelled, selection val, scores test."""
RESERVED_FIELDS = frozenset({"label", "split", "clip", "patient"})
"""Fields of a sample's JSON that the builder writes itself."""
_JSON_LIMIT = 2**20
_FIELD_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")


@dataclass(frozen=True, slots=True)
class Location:
    """Where the bytes of a file are: a local path, or an extent of an object."""

    where: str
    """Path or URI. It may identify a patient: never shown."""
    stamp: str
    """Size and time, or size and ETag: what changes when the bytes change."""
    offset: int = 0
    """First byte of the extent."""
    length: int | None = None
    """None is the whole local file."""

    def read(self, storage: Storage) -> bytes:
        """The bytes. Raises ImageError where a local file cannot be read, StorageError for an object."""
        if self.length is not None:
            return storage.read_range(self.where, self.offset, self.length)
        try:
            return Path(self.where).read_bytes()
        except OSError as error:
            raise ImageError(f"the file cannot be read ({error.strerror})") from None


@dataclass(frozen=True, slots=True)
class Row:
    """One sample of a source, not yet read. Identifiers are as the source has them: they never leave the process."""

    number: int
    """Number of the CSV's data row, of the file, or of the sample, from 1."""
    reference: str
    """Relative path or key in the source."""
    image: Location | None
    """The image; None where it is computed and not read."""
    mask: Location | None = None
    """The mask, where there is one."""
    label: str = ""
    """Class; empty where not known."""
    split: str = ""
    """train, val or test; empty where the source does not say."""
    patient: str = ""
    """Patient; empty where not known."""
    clip: str = ""
    """Clip inside the patient; empty for a still image."""
    fields: tuple[tuple[str, str], ...] = ()
    """Metadata to keep: names and texts."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a CSV, or fields of a WebDataset's JSON, mean what. Empty text is: there is none."""

    path: str = "path"
    """Path of the image."""
    mask: str = ""
    """Path of the mask."""
    label: str = ""
    """Class."""
    split: str = ""
    """Split."""
    patient: str = ""
    """Patient."""
    clip: str = ""
    """Clip inside the patient."""
    extra: tuple[str, ...] = ()
    """Columns to keep in each sample's JSON, under their own names."""
    where: tuple[tuple[str, str], ...] = ()
    """(column, value): rows to use. Values of one column are alternatives; all columns must agree."""
    unknown_patients: frozenset[str] = frozenset()
    """Texts in the patient column that stand for: not known."""
    split_names: Mapping[str, str] = field(default_factory=dict)
    """Text in the split column to one of SPLITS."""

    def __post_init__(self) -> None:
        identifying = {self.path, self.mask, self.patient, self.clip} - {""}
        for name in self.extra:
            if name in identifying:
                raise SourceError(f"--column {name}: this column identifies; the shards get its keyed hash only")
            if name in RESERVED_FIELDS:
                raise SourceError(
                    f"--column {name}: the name is taken; use --{name}-column {name} or rename the column"
                )
            if not _FIELD_NAME.match(name):
                raise SourceError(f"--column {name!r}: use letters, digits, dots, dashes and underscores")

    @property
    def named(self) -> tuple[str, ...]:
        """Every column that must exist, except the path."""
        single = (self.mask, self.label, self.split, self.patient, self.clip)
        return tuple(name for name in (*single, *self.extra, *(name for name, _ in self.where)) if name)

    def wanted(self, values: Mapping[str, str]) -> bool:
        """Whether a row passes the filters."""
        allowed: dict[str, set[str]] = {}
        for name, value in self.where:
            allowed.setdefault(name, set()).add(value)
        return all(values.get(name, "").strip() in texts for name, texts in allowed.items())

    def row(
        self, number: int, reference: str, image: Location, mask: Location | None, values: Mapping[str, str]
    ) -> Row:
        """The row that the values describe. Raises SourceError where the split is not one."""
        taken = {name: values.get(name, "").strip() for name in self.named}
        split = taken.get(self.split, "")
        split = self.split_names.get(split, split)
        if split and split not in SPLITS:
            raise SourceError(
                f"row {number}: the split is none of {', '.join(SPLITS)}; map what is there with "
                "--split-value FOUND=train"
            )
        patient = taken.get(self.patient, "")
        return Row(
            number,
            reference,
            image,
            mask,
            label=taken.get(self.label, ""),
            split=split,
            patient="" if patient in self.unknown_patients else patient,
            clip=taken.get(self.clip, ""),
            fields=tuple((name, taken[name]) for name in self.extra),
        )


def read_csv(file: Path, root: Path, columns: Columns, delimiter: str = ",") -> list[Row]:
    """Rows of a CSV with a header whose paths are relative to `root`.

    A file that is missing is no error here but a rejected image later. Raises SourceError.
    """
    rows: list[Row] = []
    seen: dict[str, int] = {}
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, delimiter=delimiter)
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            cells = len(reader.fieldnames)
            hint = f"the first line has {cells} cells; is it a header, and is --delimiter right?"
            _check_columns((columns.path, *columns.named), reader.fieldnames, hint)
            for number, found in enumerate(reader, 1):
                if None in found or None in found.values():
                    raise SourceError(f"row {number}: not as many cells as the header has; is --delimiter right?")
                values = dict(found)
                if not columns.wanted(values):
                    continue
                reference = _relative(values[columns.path], number)
                if reference in seen:
                    raise SourceError(f"rows {seen[reference]} and {number} name the same file; keep one of them")
                seen[reference] = number
                mask = values[columns.mask].strip() if columns.mask else ""
                mask_location = file_location(root / _relative(mask, number)) if mask else None
                rows.append(columns.row(number, reference, file_location(root / reference), mask_location, values))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"the CSV file cannot be read as UTF-8 text with a header ({type(error).__name__})") from None
    return _some(rows)


@dataclass(frozen=True)
class FolderRule:
    """What the paths of a folder say about its images."""

    label_from_folder: bool = False
    """The first folder below the root is the label."""
    patient_pattern: str = ""
    """Regular expression searched in the relative path; its first group is the patient."""
    clip_pattern: str = ""
    """The same for the clip."""
    masks: Path | None = None
    """Folder of masks: same relative path, any image suffix."""
    mask_suffix: str = ""
    """What a mask's name has after the image's name, for example `_mask`."""

    def __post_init__(self) -> None:
        for name, pattern in (("--patient-pattern", self.patient_pattern), ("--clip-pattern", self.clip_pattern)):
            try:
                groups = re.compile(pattern).groups if pattern else 1
            except re.error as error:
                raise SourceError(f"{name}: not a regular expression ({error})") from None
            if not groups:
                raise SourceError(f"{name}: it needs a group in parentheses that holds the name")


def read_folder(root: Path, rule: FolderRule) -> list[Row]:
    """Every image below a folder, in the order of the relative paths. Hidden files are left out. Raises SourceError."""
    masks = _images_by_stem(rule.masks) if rule.masks else {}
    rows = []
    unmasked = 0
    for number, (reference, file) in enumerate(_images(root), 1):
        path = PurePosixPath(reference)
        if rule.label_from_folder and len(path.parts) < 2:
            raise SourceError(
                f"file {number} lies directly in the folder, so that it has no label; move it to a folder"
            )
        mask = masks.get(str(path.with_suffix("")) + rule.mask_suffix)
        if rule.masks and mask is None:
            unmasked += 1
        rows.append(
            Row(
                number,
                reference,
                file_location(file),
                file_location(mask) if mask else None,
                label=path.parts[0] if rule.label_from_folder else "",
                patient=named_group(rule.patient_pattern, reference, number, "--patient-pattern"),
                clip=named_group(rule.clip_pattern, reference, number, "--clip-pattern"),
            )
        )
    if unmasked:
        raise SourceError(f"{unmasked} of {len(rows)} images have no mask of the same name; check --mask-suffix")
    return _some(rows)


def read_webdataset(uri: str, columns: Columns, storage: Storage) -> list[Row]:
    """Samples of the tars below a prefix: image, mask and JSON members, and nothing else. Raises SourceError."""
    rows: list[Row] = []
    number = 0
    for info in storage.list(uri):
        if not info.uri.endswith(".tar"):
            continue
        stamp = f"{info.size}:{info.etag}"
        with io.BufferedReader(_RangeFile(storage, info.uri, info.size), 2**20) as file:
            try:
                found = members(file)
            except TarError as error:
                raise SourceError(f"{info.uri}: {error}") from None
            for key, parts in _samples(found, info.uri):
                number += 1
                image = next((m for suffix, m in parts.items() if f".{suffix}" in SUFFIXES), None)
                if image is None:
                    continue
                values = _fields(file, parts.get("json"), number)
                _check_columns(columns.named, values.keys(), f"the JSON of sample {number} has {len(values)} fields")
                if columns.wanted(values):
                    mask = parts.get("mask.png")
                    rows.append(
                        columns.row(
                            number,
                            f"{info.uri}:{key}",
                            Location(info.uri, stamp, image.offset, image.length),
                            Location(info.uri, stamp, mask.offset, mask.length) if mask else None,
                            values,
                        )
                    )
    return _some(rows)


class _RangeFile(io.RawIOBase):
    """An object as a seekable file; BufferedReader in front of it makes the reads large."""

    def __init__(self, storage: Storage, uri: str, size: int) -> None:
        self._storage, self._uri, self._size, self._at = storage, uri, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # typeshed's buffer type is private
        length = max(0, min(len(buffer), self._size - self._at))
        if length:
            buffer[:length] = self._storage.read_range(self._uri, self._at, length)
            self._at += length
        return length


def _samples(found: Iterable[Member], uri: str) -> Iterator[tuple[str, dict[str, Member]]]:
    """Neighbouring members with the same name up to the first dot of its last part are a sample."""
    key, parts = "", dict[str, Member]()
    for member in found:
        folder, slash, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        if parts and folder + slash + stem != key:
            yield key, parts
            parts = {}
        key = folder + slash + stem
        if suffix.lower() in parts:
            raise SourceError(
                f"{uri}: the members before byte {member.offset} have the same name; nothing says which counts"
            )
        parts[suffix.lower()] = member
    if parts:
        yield key, parts


def _fields(file: IO[bytes], member: Member | None, number: int) -> dict[str, str]:
    if member is None:
        return {}
    if member.length > _JSON_LIMIT:
        raise SourceError(f"sample {number}: its JSON has more than {_JSON_LIMIT} bytes")
    file.seek(member.offset)
    try:
        document = json.loads(file.read(member.length))
    except ValueError:
        raise SourceError(f"sample {number}: its JSON is broken") from None
    if not isinstance(document, dict):
        raise SourceError(f"sample {number}: its JSON is not a mapping")
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in document.items() if v is not None}


def _images(root: Path) -> list[tuple[str, Path]]:
    if not root.is_dir():
        raise SourceError("the folder of images is not there")
    found = [
        (os.fsencode(file.relative_to(root)).decode("utf-8", "backslashreplace"), file)  # not every name is UTF-8
        for file in root.rglob("*")
        if file.suffix.lower() in SUFFIXES and not any(p.startswith(".") for p in file.relative_to(root).parts)
    ]
    return sorted(found)


def _images_by_stem(root: Path) -> dict[str, Path]:
    return {str(PurePosixPath(reference).with_suffix("")): file for reference, file in _images(root)}


def named_group(pattern: str, text: str, number: int, option: str) -> str:
    """Group 1 of a pattern in a path; empty without a pattern. Raises SourceError where it does not fit."""
    if not pattern:
        return ""
    match = re.search(pattern, text)
    if match is None:
        raise SourceError(f"{option} does not fit the path of file {number}")
    return match.group(1) or ""


def _relative(text: str, number: int) -> str:
    path = PurePosixPath(text.strip())
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise SourceError(f"row {number}: the path must be relative to the root folder and stay inside it")
    return str(path)


def file_location(path: Path) -> Location:
    """A whole local file; one that is missing is an error only when it is read."""
    try:
        state = path.stat()
    except OSError:
        return Location(str(path), "missing")
    return Location(str(path), f"{state.st_size}:{state.st_mtime_ns}")


def _check_columns(wanted: Iterable[str], found: Collection[str], hint: str) -> None:
    """What was found is not quoted: the first line of a file without a header is a patient's."""
    for name in wanted:
        if name not in found:
            raise SourceError(f"there is no column {name!r}; {hint}")


def _some(rows: list[Row]) -> list[Row]:
    if not rows:
        raise SourceError("the source has no images, or the filters leave none")
    return rows
