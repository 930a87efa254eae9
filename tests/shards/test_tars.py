"""Tars are deterministic, plain, and read strictly."""

import io
import tarfile
from pathlib import Path

import pytest

from sonoforge_trainer.shards.faults import TarError
from sonoforge_trainer.shards.tars import Member, TarWriter, members


def _tar() -> bytes:
    file = io.BytesIO()
    tar = TarWriter(file)
    assert tar.add("00000000-aa.jpg", b"j" * 700) == Member("00000000-aa.jpg", 512, 700)
    assert tar.add("00000000-aa.json", b"{}") == Member("00000000-aa.json", 2048, 2)
    tar.close()
    return file.getvalue()


def test_members_have_no_time_owner_or_extension_header() -> None:
    with tarfile.open(fileobj=io.BytesIO(_tar())) as tar:
        for info in tar:
            assert (info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) == (0, 0, 0, "", "", 0o644)
            assert not info.pax_headers
    assert len(_tar()) == 10240
    assert _tar() == _tar()


def test_members_are_found_where_they_were_written() -> None:
    assert members(io.BytesIO(_tar())) == [Member("00000000-aa.jpg", 512, 700), Member("00000000-aa.json", 2048, 2)]


@pytest.mark.parametrize("end", [100, 512, 600, 1536, 2048, 2050, 2560, 3000])
def test_a_cut_anywhere_is_noticed_also_between_two_members(end: int) -> None:
    """1536 and 2560 are the borders of members, where tarfile sees nothing wrong."""
    with pytest.raises(TarError):
        members(io.BytesIO(_tar()[:end]))


def test_a_flipped_byte_in_a_header_is_noticed() -> None:
    """tarfile takes it for the end of the archive."""
    data = bytearray(_tar())
    data[1536 + 3] ^= 1
    with pytest.raises(TarError, match="damaged or cut at byte 1536"):
        members(io.BytesIO(data))


def test_links_are_refused(tmp_path: Path) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(TarError, match="the member at byte 0 is not a regular file"):
        members(io.BytesIO(file.getvalue()))
