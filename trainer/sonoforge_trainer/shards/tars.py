"""WebDataset tars: written so that equal samples give equal bytes, read so that damage is noticed.

Python's tarfile takes a damaged header, or a cut between two members, for the end of the archive without a word.
"""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from typing import IO

from sonoforge_trainer.shards.faults import TarError

_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True, slots=True)
class Member:
    """One regular file of a tar."""

    name: str
    """Path in the tar."""
    offset: int
    """First byte of its data."""
    length: int
    """Bytes of its data."""


class TarWriter:
    """Writes ustar with every time, owner and right fixed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._tar = tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 - see close()

    def add(self, name: str, data: bytes) -> Member:
        """Append one member."""
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = len(data), 0o644, 0
        member = Member(name, self._tar.offset + _BLOCK, len(data))
        self._tar.addfile(info, io.BytesIO(data))
        return member

    def close(self) -> None:
        """Write the end of the archive; the file stays open."""
        self._tar.close()


def members(file: IO[bytes]) -> list[Member]:
    """Regular files of an uncompressed tar in order; directories are left out.

    Raises TarError where a header is damaged, the archive stops before its end mark, or a member is a link, a device or
    sparse.
    """
    found = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                if info.isdir():
                    continue
                if not info.isreg() or info.issparse():
                    raise TarError(f"the member at byte {info.offset} is not a regular file")
                found.append(Member(info.name, info.offset_data, info.size))
            end = tar.offset
    except (tarfile.TarError, EOFError, OSError, UnicodeError) as error:
        raise TarError(f"not a readable tar ({type(error).__name__})") from None
    file.seek(end)
    if file.read(2 * _BLOCK) != bytes(2 * _BLOCK):
        raise TarError(f"damaged or cut at byte {end}: neither a valid header nor the end of the archive is there")
    return found
