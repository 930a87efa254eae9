"""The CSV tables of public sets: stripped headers and values, and errors that say which column is missing."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sonoforge_trainer.shards.faults import SourceError


@dataclass(frozen=True)
class DataTable:
    """A table as it is."""

    header: tuple[str, ...]
    """Names of the columns as the file has them, spaces included."""
    rows: tuple[dict[str, str], ...]
    """Stripped values by stripped column."""


def read_table(file: Path, columns: Sequence[str], delimiter: str = ",") -> DataTable:
    """Read a CSV with a header that has at least these columns. Raises SourceError."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            lines = [line for line in csv.reader(stream, delimiter=delimiter) if any(cell.strip() for cell in line)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"{file.name}: cannot be read as UTF-8 text with a header ({type(error).__name__})") from None
    if not lines:
        raise SourceError(f"{file.name}: is empty; download it again")
    header, *body = lines
    names = [name.strip() for name in header]
    missing = [column for column in columns if column not in names]
    if missing:
        # What was found is not quoted: the first line of a file without a header is a patient's.
        raise SourceError(
            f"{file.name}: there is no column {' or '.join(missing)}; the first line has {len(names)} cells; is it the "
            "header? Give the table as it was published"
        )
    for number, line in enumerate(body, 1):
        if len(line) != len(header):
            raise SourceError(f"{file.name}: row {number} has {len(line)} cells, its header {len(header)}")
    rows = tuple(dict(zip(names, (cell.strip() for cell in line), strict=True)) for line in body)
    return DataTable(tuple(header), rows)


def strange_spaces(table: DataTable) -> int:
    """How many column names have space around them."""
    return sum(name != name.strip() for name in table.header)


def plain_name(text: str, where: str) -> str:
    """A file name from a table, which must stay in its folder. Raises SourceError."""
    if not text or "/" in text or "\\" in text or text in (".", ".."):
        raise SourceError(f"{where}: found something that is no plain file name; give the table as it was published")
    return text
