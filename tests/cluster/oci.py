"""OCI images as folders and archives, as far as the test cluster needs them: the sandbox image is written here."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
from collections.abc import Container, Iterator
from pathlib import Path
from typing import IO, Any

PAUSE = "sonoforge.test/pause:1"
"""Name of the image that holds a pod's namespaces."""
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar"
_NAME = "io.containerd.image.name"


class Layout:
    """An OCI image layout: blobs by digest, and an index of names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def manifest(self, reference: str) -> dict[str, Any]:
        """Descriptor of a named image's manifest. Raises KeyError."""
        for descriptor in json.loads((self.folder / "index.json").read_text())["manifests"]:
            if descriptor.get("annotations", {}).get("org.opencontainers.image.ref.name") == reference:
                found: dict[str, Any] = descriptor
                return found
        raise KeyError(reference)

    def blobs(self, manifest: dict[str, Any]) -> Iterator[str]:
        """Digests of everything an image consists of, its layers first and its manifest last."""
        content = json.loads(self.path(manifest["digest"]).read_text())
        yield from (layer["digest"] for layer in content["layers"])
        yield content["config"]["digest"]
        yield manifest["digest"]

    def size(self, manifest: dict[str, Any]) -> int:
        """Bytes of the layers."""
        content = json.loads(self.path(manifest["digest"]).read_text())
        return sum(int(layer["size"]) for layer in content["layers"])

    def path(self, digest: str) -> Path:
        """File of a blob."""
        return self.folder / "blobs" / digest.replace(":", "/")

    def write_archive(self, out: IO[bytes], reference: str, name: str, without: Container[str] = ()) -> None:
        """Write an image as an archive that containerd imports as `name`, without the blobs that it has already."""
        manifest = self.manifest(reference)
        with tarfile.open(fileobj=out, mode="w|") as archive:
            _add(archive, "oci-layout", b'{"imageLayoutVersion": "1.0.0"}')
            for digest in self.blobs(manifest):
                if digest not in without:
                    archive.add(self.path(digest), f"blobs/{digest.replace(':', '/')}")
            _add(archive, "index.json", _index(manifest, name))


def write_pause(out: IO[bytes]) -> None:
    """Write the archive of the sandbox image: one static program that waits for ever."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as files:
        member = tarfile.TarInfo("pause")
        member.size, member.mode = len(_waits_for_ever()), 0o755
        files.addfile(member, io.BytesIO(_waits_for_ever()))
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": ["/pause"], "User": "65535:65535"},
        "rootfs": {"type": "layers", "diff_ids": [_digest(layer.getvalue())]},
    }
    parts = {_LAYER: layer.getvalue(), _CONFIG: json.dumps(config).encode()}
    descriptors = {kind: {"mediaType": kind, "digest": _digest(b), "size": len(b)} for kind, b in parts.items()}
    manifest = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST,
        "config": descriptors[_CONFIG],
        "layers": [descriptors[_LAYER]],
    }
    parts[_MANIFEST] = json.dumps(manifest).encode()
    with tarfile.open(fileobj=out, mode="w|") as archive:
        _add(archive, "oci-layout", b'{"imageLayoutVersion": "1.0.0"}')
        for content in parts.values():
            _add(archive, f"blobs/{_digest(content).replace(':', '/')}", content)
        content = parts[_MANIFEST]
        _add(
            archive,
            "index.json",
            _index({"mediaType": _MANIFEST, "digest": _digest(content), "size": len(content)}, PAUSE),
        )


def _waits_for_ever() -> bytes:
    """A 64-bit ELF program for x86-64: `while (1) pause();`."""
    code = b"\xb8\x22\x00\x00\x00\x0f\x05\xeb\xf7"  # mov eax, 34; syscall; jmp to the start
    base, headers = 0x400000, 64 + 56
    size = headers + len(code)
    identity = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = identity + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, base + headers, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 0x1000)  # all of the file, readable, executable
    return header + segment + code


def _index(manifest: dict[str, Any], name: str) -> bytes:
    named = {**manifest, "annotations": {_NAME: name}}
    return json.dumps({"schemaVersion": 2, "manifests": [named]}).encode()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
