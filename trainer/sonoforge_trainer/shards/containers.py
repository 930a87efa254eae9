"""JPEG and PNG files without what is not needed to decode them.

EXIF, comments, text chunks, thumbnails and bytes after the end can hold a patient's name; the compressed pixels are
kept to the bit.
"""

from __future__ import annotations

import re
import zlib

from sonoforge_trainer.shards.faults import ImageError

_SOI, _EOI, _SOS, _SOF0, _APP0, _APP14, _COM = 0xD8, 0xD9, 0xDA, 0xC0, 0xE0, 0xEE, 0xFE
_NEEDED_SEGMENTS = {0xDB, 0xC4, 0xDD}  # quantisation tables, Huffman tables, restart interval
# Inside entropy-coded data FF00 is a data byte, FFD0 to FFD7 are restart markers and FFFF is filling.
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def plain_jpeg(data: bytes) -> bytes | None:
    """The file reduced to the segments that decoding needs, or None where it is not a plain one.

    Plain is: baseline, 8 bit, one or three components, complete up to its end marker (ITU-T T.81, Annex B).
    """
    if data[:2] != bytes((0xFF, _SOI)):
        return None
    parts = [data[:2]]
    plain_frame = False
    at = 2
    while True:
        while data[at : at + 2] == b"\xff\xff":
            at += 1
        if len(data) < at + 2 or data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == _EOI:
            parts.append(data[at : at + 2])
            return b"".join(parts) if plain_frame else None
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        end = at + 2 + length
        if length < 2 or end > len(data):
            return None
        payload = data[at + 4 : end]
        if marker == _SOS:
            found = _NEXT_MARKER.search(data, end)
            if found is None:
                return None
            parts.append(data[at : found.start()])
            at = found.start()
            continue
        if marker == _SOF0:
            plain_frame = len(payload) > 5 and payload[0] == 8 and payload[5] in (1, 3)
            parts.append(data[at:end])
        elif marker in _NEEDED_SEGMENTS:
            parts.append(data[at:end])
        elif marker == _APP0 and payload[:5] == b"JFIF\0" and len(payload) >= 14:
            parts.append(_segment(_APP0, payload[:12] + b"\0\0"))  # the last two bytes: a thumbnail of 0 x 0
        elif marker == _APP14 and payload[:5] == b"Adobe" and len(payload) >= 12:
            parts.append(_segment(_APP14, payload[:12]))  # says which colour transform was used
        elif not (_APP0 <= marker <= 0xEF or marker == _COM):
            return None
        at = end


def _segment(marker: int, payload: bytes) -> bytes:
    return bytes((0xFF, marker)) + (len(payload) + 2).to_bytes(2, "big") + payload


def plain_png(data: bytes) -> bytes | None:
    """The file reduced to header, pixels and end, or None where it is not an 8-bit gray or RGB one without alpha.

    Raises ImageError where a checksum is wrong.
    """
    if data[:8] != _PNG_SIGNATURE:
        return None
    parts = [_PNG_SIGNATURE]
    at = 8
    while True:
        length = int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        end = at + 12 + length
        if end > len(data):
            return None
        if kind == b"tRNS" or (kind == b"IHDR" and (data[at + 16] != 8 or data[at + 17] not in (0, 2))):
            return None
        if kind in (b"IHDR", b"IDAT", b"IEND"):
            if zlib.crc32(data[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
                raise ImageError("damaged: a checksum inside the PNG file is wrong")
            parts.append(data[at:end])
        if kind == b"IEND":
            return b"".join(parts)
        at = end
