"""What is in an image, as a CycloneDX 1.6 document: the wheels of its lock, and the Debian packages of its base."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
import zipfile
from collections.abc import Iterable, Iterator
from email.parser import Parser
from pathlib import Path
from typing import Any

_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", re.MULTILINE)
_NAMESPACE = uuid.UUID("0b8b7a4e-53f3-4c0b-9c39-3f0f9d6f2d11")


class SbomError(Exception):
    """The document cannot be written; the message says what is missing."""


def document(image: str, version: str, components: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """A CycloneDX document of an image. The same components make the same document."""
    listed = sorted(components, key=lambda component: str(component["purl"]))
    serial = uuid.uuid5(_NAMESPACE, json.dumps([image, version, listed], sort_keys=True))
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        "metadata": {"component": {"type": "container", "name": image, "version": version}},
        "components": listed,
    }


def wheels_of_lock(lock: Path, wheelhouse: Path) -> Iterator[dict[str, Any]]:
    """A component for each wheel that the lock pins and the wheelhouse has; others are for other systems.

    Raises SbomError where the wheelhouse has none of them.
    """
    files = {wheel_name(path): path for path in sorted(wheelhouse.glob("*.whl"))}
    found = False
    for name, version in _PIN.findall(lock.read_text()):
        path = files.get((normal(name), version))
        if path is not None:
            found = True
            yield of_wheel(path)
    if not found:
        raise SbomError(f"{wheelhouse} has no wheel of {lock.name}; fill it with images/wheelhouse.py")


def of_wheel(path: Path) -> dict[str, Any]:
    """A component with the digest of the wheel and the licence that it states."""
    name, version = wheel_name(path)
    component: dict[str, Any] = {
        "type": "library",
        "name": name,
        "version": version,
        "purl": f"pkg:pypi/{name}@{version}",
        "hashes": [{"alg": "SHA-256", "content": _sha256(path)}],
    }
    stated = _licence(path)
    if stated:
        component["licenses"] = [stated]
    return component


def of_debian_packages(status: str) -> Iterator[dict[str, Any]]:
    """A component for each package of a `/var/lib/dpkg/status`."""
    for paragraph in status.split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z-]+): (.*)$", paragraph, re.MULTILINE))
        if "ok installed" in fields.get("Status", ""):
            name, version = fields["Package"], fields["Version"]
            purl = f"pkg:deb/debian/{name}@{version}?arch={fields['Architecture']}"
            yield {"type": "library", "name": name, "version": version, "purl": purl}


def wheel_name(path: Path) -> tuple[str, str]:
    """Normalised name and version of a wheel, from its file name (PEP 427)."""
    name, version = path.name.split("-")[:2]
    return normal(name), version


def normal(name: str) -> str:
    """The normalised name of a project (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _licence(path: Path) -> dict[str, Any] | None:
    with zipfile.ZipFile(path) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(wheel.read(member).decode(), headersonly=True)
    if metadata["License-Expression"]:
        return {"expression": metadata["License-Expression"]}
    classified = [c.rsplit(" :: ", 1)[1] for c in metadata.get_all("Classifier", []) if c.startswith("License ::")]
    short = (metadata["License"] or "").strip()
    name = short if short and "\n" not in short and len(short) < 100 else ", ".join(classified)
    return {"license": {"name": name}} if name else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
